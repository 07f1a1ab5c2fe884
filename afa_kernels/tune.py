"""``python -m afa_kernels --tune``: time what can take the layers of a model on this machine's card, and keep what was
the fastest where calls find it (backend/measured.py).

Timed are whole steps of a layer, forward and backward as a training has them: every backend, ``triton`` with the best
tiles of a few, and of experts both ways to the product with their weights. What is not as accurate as torch is left
out.
"""

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from afa_kernels import self_test
from afa_kernels.backend import choice, measured
from afa_kernels.backend.interface import Call
from afa_kernels.backend.measured import EXPERTS, FUSED, LAYER, Entry, Key
from afa_kernels.operator.functional import afa_linear, afa_lora

USUAL = "4096x4096,4096x14336,14336x4096"
_SECONDS = 0.4  # of each comparison
_FLUSHED = 256 << 20  # bytes that are written before each call, more than any cache holds
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Tiles = tuple[tuple[str, int], ...]  # the number of a candidate for each pass of ``triton``
Steps = dict[str, Callable[[], object]]
Clock = Callable[[Steps], dict[str, float]]  # the median time of each in microseconds, taken in turns


class Layer(NamedTuple):
    k: int
    n: int
    experts: int = 0  # each with a matrix of its own; 0: a linear layer

    def __str__(self) -> str:
        return f"{self.experts}x{self.k}x{self.n}" if self.experts else f"{self.k}x{self.n}"


class Case(NamedTuple):
    layer: Layer
    r: int
    rows: int
    dtype: torch.dtype
    weights: torch.dtype  # of A and B

    @property
    def kind(self) -> str:
        return EXPERTS if self.layer.experts else LAYER

    @property
    def key(self) -> Key:
        return Key.of(self.kind, self.dtype, self.layer.k, self.layer.n, self.r)


def layers_of(what: str) -> list[Layer]:
    """Return the layers of ``what``: KxN or, of experts, ExKxN, several after commas, or the name or folder of a model
    of transformers, of which its configuration is read alone.

    Raises:
        ValueError: it is neither.
    """
    if re.fullmatch(r"\d+(x\d+){1,2}(,\d+(x\d+){1,2})*", what):
        sizes = [tuple(map(int, each.split("x"))) for each in what.split(",")]
        return [Layer(*size) if len(size) == 2 else Layer(*size[1:], size[0]) for size in sizes]
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(what))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"--tune: expected KxN or ExKxN, several after commas, or a model of transformers, got {what!r}: {error}"
        ) from error
    return list(dict.fromkeys(_of_model(model)))


def _of_model(model: torch.nn.Module) -> Iterator[Layer]:
    from afa_kernels.experts.parameters import projections, weight_of, why_unsupported
    from afa_kernels.layers.quantized import weight_like
    from afa_kernels.model.targets import ALL_LINEAR, find_targets

    for target in find_targets(model, ALL_LINEAR, (), []):
        n, k = weight_like(target.module).shape
        yield Layer(k, n)
    for module in model.modules():
        if hasattr(module, "has_gate"):
            for name in projections(module):
                if why_unsupported(module, name) is None:
                    experts, n, k = weight_of(module, name).shape
                    yield Layer(k, n, experts)


class Problem:
    """A layer with random operands, its rows in equal parts where it has experts."""

    def __init__(self, case: Case, device: torch.device):
        (k, n, experts), (_, r, rows, dtype, weights) = case.layer, case
        generator = torch.Generator(device).manual_seed(0)  # of its own: the caller's stays as it is
        own = (experts,) if experts else ()

        def draw(*shape: int, dtype=dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

        self.x, self.dy = draw(rows, k), draw(rows, n)
        self.weight = draw(*own, n, k, scale=k**-0.5)
        self.a, self.b = draw(*own, r, k, dtype=weights, scale=k**-0.5), draw(*own, n, r, dtype=weights, scale=r**-0.5)
        self.alpha_t = torch.tensor(0.5, device=device)
        self.rows = {}
        if experts:
            ends = torch.arange(1, experts + 1, device=device) * rows // experts
            self.rows = {"offsets": ends.int()}

    def step(self, backend: str, *, frozen: bool = True, dropout_p: float = 0.0) -> list[Tensor]:
        """Return y and the gradients of x, A and B: of the layer, or of the branch alone."""
        leaves = [t.detach().requires_grad_() for t in (self.x, self.a, self.b)]
        given = {"dropout_p": dropout_p, "dropout_seed": 7, "backend": backend, **self.rows}
        x, a, b = leaves
        if frozen:
            y = afa_linear(x, self.weight, None, a, b, self.alpha_t, **given)
        else:
            y = afa_lora(x, a, b, self.alpha_t, **given)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]


def interleaved(device: torch.device) -> Clock:
    """Return a clock of a card: steps in turns, in another order each time, with cold caches."""
    module = torch.get_device_module(device)
    flushed = torch.empty(_FLUSHED, dtype=torch.int8, device=device)

    def clock(steps: Steps) -> dict[str, float]:
        taken: dict[str, list[float]] = {name: [] for name in steps}
        order, end = list(steps), time.monotonic() + _SECONDS
        for step in steps.values():
            step()
        while time.monotonic() < end or len(taken[order[0]]) < 5:
            random.Random(len(taken[order[0]])).shuffle(order)
            for name in order:
                start, stop = (module.Event(enable_timing=True) for _ in range(2))
                flushed.zero_()
                start.record()
                steps[name]()
                stop.record()
                stop.synchronize()
                taken[name].append(1e3 * start.elapsed_time(stop))
        return {name: statistics.median(each) for name, each in taken.items()}

    return clock


def best_tiles(problem: Problem, case: Case, device: torch.device, clock: Clock) -> Tiles:
    """Return the tiles of ``triton`` that are the fastest, pass by pass."""
    from afa_kernels.backend.triton import configs, tuning

    triton, call = choice.get("triton"), _call(case, device)
    row, found = configs.table_tiles(configs.device_of(device).arch, case.dtype.itemsize, case.r), ()
    for name in tuning.PASSES:
        masked, fused = name.endswith("dropout"), name == "gemm"
        if (masked and triton.refuses(call._replace(dropout=True))) or (fused and not case.layer.experts):
            continue
        how, steps = {"frozen": fused, "dropout_p": 0.1 if masked else 0.0}, {}
        for number, _ in enumerate(tuning.candidates(getattr(row, name))):
            step = _trial(case, FUSED, (*found, (name, number)), problem, **how)
            if _runs(step):
                steps[str(number)] = step
        if steps:
            times = clock(steps)
            found = (*found, (name, int(min(times, key=times.__getitem__))))
    return found


def _runs(step: Callable[[], object]) -> bool:
    """Whether the tiles of a step fit the card."""
    from afa_kernels.backend.triton import tuning

    try:
        step()
    except Exception as error:
        if not tuning.is_too_much(error):
            raise
        return False
    return True


def _entry(case: Case, us: dict[str, float], tiles: Tiles, rows: int | None) -> Entry:
    return Entry(case.key, us, rows, str(case.weights).removeprefix("torch."), tiles)


def _as_if_fastest(case: Case, way: str, tiles: Tiles) -> Entry:
    """Return what lets ``way`` run: of the two ways of ``triton``, the one that is said to be faster."""
    return _entry(case, {"triton": 1.0 + (way == FUSED), FUSED: 1.0 + (way != FUSED)}, tiles, None)


def _trial(case: Case, way: str, tiles: Tiles, problem: Problem, **how) -> Callable[[], list[Tensor]]:
    entry, backend = _as_if_fastest(case, way, tiles), way.partition(",")[0]

    def step() -> list[Tensor]:
        with measured.trial(entry):
            return problem.step(backend, **how)

    return step


def ways(case: Case, device: torch.device) -> list[str]:
    """Return what can take a layer: backends, and ``triton`` with the product of experts."""
    call = _call(case, device)
    found = [name for name in choice.names() if name != "reference" and choice.get(name).why_not(call) is None]
    return [*found, FUSED] if case.layer.experts and "triton" in found else found


def _call(case: Case, device: torch.device) -> Call:
    layer = case.layer
    sizes = (case.rows, layer.k, layer.n, case.r, "silu")
    return Call(device.type, case.dtype, *sizes, device_index=device.index, owners=layer.experts)


def measure(case: Case, device: torch.device, clock: Clock, tiles: Tiles | None = None) -> tuple[Entry, list[str]]:
    """Return what was measured of a layer, with these tiles of ``triton`` or the best ones, and what was left out, with
    the reason."""
    problem, steps, left_out, found = Problem(case, device), {}, [], ways(case, device)
    if tiles is None:
        tiles = best_tiles(problem, case, device, clock) if "triton" in found else ()
    (k, n, experts), rows = case.layer, max(case.rows, 64)
    checked = self_test.Case(rows, k, n, case.r, case.dtype, owners=5 if experts else 0, weights=case.weights)
    for way in found:
        with measured.trial(_as_if_fastest(case, way, tiles)):
            wrong = self_test.failures_of(checked, way.partition(",")[0], device)
        if wrong:
            left_out += [f"{way}: {line}" for line in wrong]
        else:
            steps[way] = _trial(case, way, tiles, problem)
    return _entry(case, clock(steps), tiles, case.rows), left_out


def tune(cases: list[Case], device: torch.device, clock: Clock, *, by_tokens: bool = False) -> list[Entry]:
    """Measure cases, print a table, and return what a file keeps: for each layer one entry, whose times are geometric
    means over its numbers of rows, or with ``by_tokens`` one for each."""
    print(f"{'layer':>16} {'r':>4} {'rows':>7}  {'before':18} {'now':18} us")
    found: dict[Key, list[Entry]] = {}
    for case in sorted(cases, key=lambda case: -case.rows):
        before = chosen(case, device)
        of_layer = found.setdefault(case.key, [])
        # One choice for all numbers of rows is one choice of tiles: those of the largest.
        entry, left_out = measure(case, device, clock, of_layer[0].tiles if of_layer and not by_tokens else None)
        of_layer.append(entry)
        times = "  ".join(f"{name} {us:.1f}" for name, us in entry.us.items())
        print(f"{case.layer!s:>16} {case.r:>4} {case.rows:>7}  {before:18} {entry.fastest:18} {times}", flush=True)
        for reason in left_out:
            print(f"{'':31}left out: {reason}")
    return [entry for of_layer in found.values() for entry in (of_layer if by_tokens else [_mean(of_layer)])]


def _mean(entries: list[Entry]) -> Entry:
    common = [name for name in entries[0].us if all(name in entry.us for entry in entries)]
    us = {name: statistics.geometric_mean(entry.us[name] for entry in entries) for name in common}
    return entries[0]._replace(us=us, rows=None)


def chosen(case: Case, device: torch.device) -> str:
    """Return what takes a layer as things are."""
    backend, layer = choice.select(_call(case, device), None).backend, case.layer
    if not layer.experts:
        return backend.name
    x, weight = (
        torch.empty(1, dtype=case.dtype, device=device).expand(shape)
        for shape in ((case.rows, layer.k), (layer.experts, layer.n, layer.k))
    )
    return FUSED if backend.multiplies(x, weight, case.r) else backend.name


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``--tune``."""
    group = parser.add_argument_group("--tune")
    group.add_argument(
        "--tune", nargs="?", const=USUAL, metavar="LAYERS",
        help="time what can take these layers on this card, and keep the result: KxN or, of experts, ExKxN, several "
        f"after commas, or a model of transformers (default: {USUAL})",
    )  # fmt: skip
    group.add_argument("--ranks", default="16", help="ranks, after commas (default: 16)")
    group.add_argument("--tokens", default="8192", help="rows, after commas (default: 8192)")
    group.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of x (default: bfloat16)")
    group.add_argument("--weights", choices=_DTYPES, default="float32", help="of A and B (default: float32, as PEFT)")
    group.add_argument(
        "--by-tokens", action="store_true",
        help="choose for each number of rows by itself: then the bits of a row depend on how many there are",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    device = _device()
    if device is None:
        print("--tune: torch sees no GPU here; on a CPU there is nothing to choose by time", file=sys.stderr)
        return 1
    try:
        ranks, rows = (_numbers(name, getattr(options, name)) for name in ("ranks", "tokens"))
        layers = layers_of(options.tune)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    types = _DTYPES[options.dtype], _DTYPES[options.weights]
    cases = [Case(layer, r, m, *types) for layer in layers for r in ranks for m in rows]
    entries = tune(cases, device, interleaved(device), by_tokens=options.by_tokens)
    try:
        print(f"kept in {measured.write(device, entries)}")
    except OSError as error:
        print(
            f"not kept, so calls do not follow it: {error}; {measured.FOLDER_VARIABLE} names another folder",
            file=sys.stderr,
        )
        return 1
    choice.forget_choices()
    return 0


def _device() -> torch.device | None:
    return next((torch.device(kind, 0) for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)


def _numbers(name: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"--{name}: expected positive numbers, several after commas, got {text!r}")
    return [int(each) for each in text.split(",")]
