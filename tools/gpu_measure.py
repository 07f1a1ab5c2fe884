"""``python -m tools.gpu_measure STEP``: the steps of gpu_check that measure. Each is a process of its own.

Times are medians of interleaved rounds in one process, on random data: products of zeros run faster.
"""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from afa_kernels import AFALinear, AFASharedInput, torch_private, tune
from afa_kernels.backend import choice, measured
from bench import providers, transformer
from bench.model import on_card
from bench.model.cuda_launches import H100, Layer
from bench.model.experts import PARAMETERS, TOKENS
from bench.shapes import Case
from bench.timing import Work, clock_of, measure
from tools.gpu_check import RESULTS, ROOT, Absent, Steps, run_step
from tools.gpu_right import Card, beside, card, in_graph, wait

VARIANT = "AFA_CUDA_VARIANT"  # csrc/cuda/host/variant.h
_LAUNCHES = ("", "overlap=0", "carveout=-1", "overlap=0 carveout=-1")
_LOOPS = ("", "stages=2", "stages=3", "stages=4", "chunks=4", "chunks=8", "chunks=32")
_REPEATS = 20  # of a short call, in a graph
_PROFILED = 20  # calls
# Demangled or not.
_KERNEL = re.compile(r"afa(?:::|\d+)(forward|project|expand|project_dy|dy|db|x|pack|reduce)_kernel")


def seconds_of(calls: dict[str, Callable[[], object]], card: Card) -> dict[str, float]:
    """Return the median seconds of each function."""
    works = {
        name: Work(prepare=lambda: None, steps={"call": lambda _, call=call: call()}) for name, call in calls.items()
    }
    measure(works, clock_of(card.device), seconds=0.05 if card.small else 1.0)
    return {name: statistics.median(work.samples["call"]) * 1e-3 for name, work in works.items()}


def half(card: Card, *shape: int) -> Tensor:
    return torch.randn(*shape, device=card.device).bfloat16()


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


# --- What decides the design


def products(card: Card) -> Iterator[dict]:
    """Is the read of beta = 1 hidden behind the products, and what do a few more columns of K cost?"""
    for m, k, n in [(32, 64, 64)] if card.small else [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096)]:
        x, weight, y = half(card, m, k), half(card, n, k), half(card, m, n)
        calls = {"mm": lambda x=x, weight=weight, y=y: torch.mm(x, weight.T, out=y)}
        # However often y is added to, it stays in range.
        calls["addmm_"] = lambda x=x, weight=weight, y=y: y.addmm_(x, weight.T, beta=0.5, alpha=0.01)
        for more in (16, 64):
            longer = half(card, m, k + more), half(card, n, k + more)
            calls[f"mm, K + {more}"] = lambda longer=longer, y=y: torch.mm(longer[0], longer[1].T, out=y)
        taken = seconds_of(calls, card)
        for name, seconds in taken.items():
            yield {
                "M, K, N": f"{m}, {k}, {n}", "product": name, "us": _us(seconds),
                "of mm": round(seconds / taken["mm"], 3), "TFLOP/s": round(2e-12 * m * k * n / seconds, 1),
            }  # fmt: skip


def grouped(card: Card) -> Iterator[dict]:
    """grouped_mm on the experts of a layer, beside one product of as much arithmetic."""
    if not torch_private.has_grouped_mm():
        raise Absent(f"torch {torch.__version__} has no grouped_mm")
    shapes = {"small": (3, 1, 16, 24)} if card.small else PARAMETERS
    for name, (experts, top_k, n, k) in shapes.items():
        m = (30 if card.small else TOKENS) * top_k
        x, weight, one = half(card, m, k), half(card, experts, n, k), half(card, n, k)
        ends = (torch.arange(1, experts + 1, device=card.device) * m // experts).int()
        taken = seconds_of(
            {
                "mm": partial(torch.mm, x, one.T),
                "grouped_mm": partial(torch_private.grouped_mm, x, weight.mT, ends),
            },
            card,
        )
        yield {
            "layer": name, "mm, us": _us(taken["mm"]), "grouped_mm, us": _us(taken["grouped_mm"]),
            "TFLOP/s": round(2e-12 * m * k * n / taken["grouped_mm"], 1),
            "rate of mm": round(taken["mm"] / taken["grouped_mm"], 3),
        }  # fmt: skip


@triton.jit
def _stream_kernel(source, target, blocks, READS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = block * BLOCK + lanes
        if READS:
            total += tl.load(source + place)
        if WRITES:
            tl.store(target + place, total)
    if not WRITES:
        tl.store(target + tl.program_id(0) * BLOCK + lanes, total)


def rates(card: Card) -> Iterator[dict]:
    """Bytes per second of one block of 1024 threads on each of some multiprocessors."""
    block, nbytes = (64, 4096) if card.small else (16384, 1 << 31)
    source = torch.zeros(nbytes // 4, dtype=torch.int32, device=card.device)
    target = torch.empty_like(source)
    all_of_them = 2 if card.small else torch.cuda.get_device_properties(0).multi_processor_count
    for count in (1, 2) if card.small else (64, 96, all_of_them):
        calls = {
            name: partial(
                _stream_kernel[(count,)], source, target, nbytes // 4 // block, reads, writes, block, num_warps=32
            )
            for name, reads, writes in (("read", True, False), ("write", False, True), ("copy", True, True))
        }
        taken = seconds_of(calls, card)
        moved = {"read": nbytes, "write": nbytes, "copy": 2 * nbytes}
        yield {"multiprocessors": count} | {
            f"{name}, TB/s": round(moved[name] / seconds * 1e-12, 3) for name, seconds in taken.items()
        }


def in_variants(step: str, variants: Iterable[str]) -> Iterator[dict]:
    """Run a step in a process for each variant of the launches; yield its rows."""
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            kept = Path(folder, "rows.jsonl")
            kept.write_text("")
            variables = os.environ | {VARIANT: variant, RESULTS: f"{kept}:{step}"}
            done = subprocess.run([sys.executable, "-m", "tools.gpu_measure", step], cwd=ROOT, env=variables)
            for row in map(json.loads, kept.read_text().splitlines()):
                yield {key: value for key, value in row.items() if key not in ("kind", "step")}
            if done.returncode:
                yield {"variant": variant or "as chosen", "fault": f"{variant}: exit status {done.returncode}"}


def _variant() -> str:
    return os.environ.get(VARIANT, "") or "as chosen"


def launches(card: Card) -> Iterator[dict]:
    """Kernels of this package in a graph: that do nothing, and those of a step with few rows."""
    meter = CardMeter(card)
    row = {"variant": _variant(), "nothing, us": _us(meter.in_graph(meter.nothing()))}
    for m in (8, 16) if card.small else (64, 1024, 8192):
        _, step = meter.branch(Layer(m, 64, 64, 16) if card.small else Layer(m, 4096, 4096, 16))
        row[f"step of {m} rows, us"] = _us(meter.in_graph(step))
    yield row


# --- Is the model right?


class Event(NamedTuple):
    """Something that ran on the device, in nanoseconds."""

    name: str
    start: int
    end: int


_LANES, _WARPS = 32, 8  # of a warp; on a multiprocessor: enough to keep the memory busy, too few to fill its queues
_CHAIN = 1 << 26  # places of 4 bytes: 256 MB, beyond L2
_LOADS = 2000
_TOKEN_LAYERS = 8  # that one after the other read their weights, together beyond L2


@triton.jit
def _chase_kernel(chain_ptr, end_ptr, steps, LANES: tl.constexpr):
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    place = lanes
    for _ in range(steps):
        place = tl.load(chain_ptr + place)
    tl.store(end_ptr + lanes, place)


def chase(chain: Tensor, steps: int, multiprocessors: int) -> Tensor:
    """Return where each lane is after ``steps`` loads from ``chain``, a permutation in int32, that wait for each
    other."""
    programs = _WARPS * multiprocessors
    end = torch.empty(programs * _LANES, dtype=torch.int32, device=chain.device)
    _chase_kernel[(programs,)](chain, end, steps, LANES=_LANES, num_warps=1)
    return end


class CardMeter:
    """The times that bench.model.on_card asks for, on a card. A CPU has all but those of ``load`` and ``kernels``."""

    def __init__(self, card: Card):
        self.card, self.device = card, card.device

    def mapped(self, nbytes: int) -> float:
        source = torch.zeros(nbytes // 4, device=self.device)
        target = torch.empty_like(source)
        return self.in_graph(lambda: torch.neg(source, out=target))

    def launch(self) -> float:
        nothing = torch.empty(1, device=self.device)
        return self.in_graph(lambda: nothing.fill_(1.0))

    def nothing(self) -> Callable[[], None]:
        """Return what launches a kernel of this package that does next to nothing."""
        operands = [
            torch.zeros(count, dtype=dtype, device=self.device)
            for count, dtype in ((512, torch.bfloat16), (128, torch.float32), (608, torch.int32))
        ]
        kernels = choice.get(self.card.cuda)._module

        def launch() -> None:
            stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
            kernels.primitive_check(0, *(operand.data_ptr() for operand in operands), 0, stream)

        return launch

    def hidden(self) -> float:
        """Such kernels among themselves and by turns with others: only behind one of its own may such a kernel begin
        before that one has ended."""
        ours, nothing = self.nothing(), torch.empty(1, device=self.device)

        def other() -> None:
            nothing.fill_(1.0)

        def by_turns() -> None:
            ours()
            other()

        return max(0.0, self.in_graph(by_turns) - self.in_graph(ours) - self.in_graph(other))

    def load(self) -> float:
        chain = torch.randperm(_CHAIN, device=self.device).int()
        multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return seconds_of({"load": lambda: chase(chain, _LOADS, multiprocessors)}, self.card)["load"] / _LOADS

    def gemm(self, m: int, k: int, n: int) -> tuple[float, float]:
        x, weight, y = half(self.card, m, k), half(self.card, n, k), half(self.card, m, n)
        taken = seconds_of(
            {"product": lambda: torch.mm(x, weight.T, out=y), "added": lambda: y.addmm_(x, weight.T)}, self.card
        )
        return taken["product"], taken["added"]

    def kernels(self, layer: Layer) -> tuple[dict[str, float], dict[str, float]]:
        x, dys, leaves, _, call = self._layer(layer)
        torch.autograd.grad(call(x), leaves, dys)
        calls = 1 if self.card.small else _PROFILED
        taken = Counter(), Counter()
        for _ in range(calls):
            ys, forward = self.recorded(call, x)
            _, backward = self.recorded(torch.autograd.grad, ys, leaves, dys)
            for seconds, events in zip(taken, (forward, backward), strict=True):
                seconds.update(by_kernel(events))
        forward, backward = ({name: seconds / calls for name, seconds in each.items()} for each in taken)
        return forward, backward

    def recorded(self, call: Callable, *arguments) -> tuple[object, list[Event]]:
        """Return what ``call`` returns, and all that ran on the device."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            result = call(*arguments)
            torch.cuda.synchronize()
        events = profiler.profiler.kineto_results.events()
        on_device = [event for event in events if event.device_type() == DeviceType.CUDA]
        return result, [Event(e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in on_device]

    def step(self, layer: Layer, alpha_t: float) -> tuple[float, float]:
        frozen, step = self.branch(layer, alpha_t)
        taken = seconds_of({"step": step, "frozen": frozen}, self.card)
        return taken["step"], taken["frozen"]

    def branch(self, layer: Layer, alpha_t: float = 0.5) -> tuple[Callable[[], None], Callable[[], object]]:
        """Return what calls the frozen products alone, and a step of the layer with its branch."""
        x, dys, leaves, weights, call = self._layer(layer, alpha_t)
        ys, dx = [torch.empty_like(dy) for dy in dys], torch.empty_like(x)

        @torch.no_grad()
        def frozen() -> None:
            for weight, y, dy in zip(weights, ys, dys, strict=True):
                torch.mm(x, weight.T, out=y)
                torch.mm(dy, weight, out=dx)

        return frozen, lambda: torch.autograd.grad(call(x), leaves, dys)

    @torch.no_grad()
    def token(self, layer: Layer) -> tuple[float, float]:
        calls = [self._layer(layer) for _ in range(_TOKEN_LAYERS)]

        def whole() -> None:
            for x, *_, call in calls:
                call(x)

        def frozen() -> None:
            for x, _, _, weights, _ in calls:
                for weight in weights:
                    F.linear(x, weight)

        return tuple(self.in_graph(function) / _TOKEN_LAYERS for function in (whole, frozen))

    def _layer(
        self, layer: Layer, alpha_t: float = 0.5
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Callable]:
        """Return x, every dy, what is differentiated, the weights, and a call. A and B are float32 beside 16 bits."""
        members = []
        for n, r in layer.members:
            base = nn.Linear(layer.k, n, bias=False, device=self.device, dtype=torch.bfloat16)
            member = AFALinear(base, r, backend=self.card.cuda)
            nn.init.normal_(member.lora_b)
            member.set_alpha_t(alpha_t)
            members.append(member)
        together = AFASharedInput(members) if len(members) > 1 else lambda x: (members[0](x),)
        x = half(self.card, layer.m, layer.k).requires_grad_()
        dys = [half(self.card, layer.m, n) for n, _ in layer.members]
        leaves = [x, *(p for member in members for p in (member.lora_a, member.lora_b))]
        return x, dys, leaves, [member.weight for member in members], together

    def in_graph(self, call: Callable[[], object]) -> float:
        """Return the seconds of one of many calls in a CUDA graph, in which the CPU is never waited for."""

        def repeated() -> tuple[Tensor, ...]:
            for _ in range(1 if self.card.small else _REPEATS):
                call()
            return ()

        with beside(self.device):
            call()
        wait(self.device)
        _, replay = in_graph(repeated, self.device)
        return seconds_of({"graph": replay}, self.card)["graph"] / (1 if self.card.small else _REPEATS)


def by_kernel(events: Iterable[Event]) -> dict[str, float]:
    """Return the seconds of the kernels of this package among ``events``, summed by the model's names.

    With programmatic dependent launch a kernel starts while the one before it runs, and waits for it: its time counts
    from that one's end.
    """
    seconds: dict[str, float] = {}
    free = 0
    for name, start, end in sorted(events, key=lambda event: event.start):
        found = _KERNEL.search(name)
        if found:
            seconds[found[1]] = seconds.get(found[1], 0.0) + max(0, end - max(start, free)) * 1e-9
        free = max(free, end)
    return seconds


def model(card: Card) -> Iterator[dict]:
    """Hold bench.model to the card, if it is the one that it models."""
    if card.device != "cuda":
        raise Absent("the profiler of a GPU is needed")
    yield from rows_of(on_card.compare(CardMeter(card)), torch.cuda.get_device_name())


def rows_of(figures: Iterable[on_card.Figure], name: str) -> Iterator[dict]:
    for figure in figures:
        judged = figure.off and H100.card.name in name
        yield figure.row | ({"fault": f"{figure.name} is off by {figure.off:+.0%}"} if judged else {})


_COUNTED = {"r16": Layer(8192, 4096, 4096, 16), "r64": Layer(8192, 4096, 4096, 64),
            "qkv": Layer(8192, 4096, (4096, 1024, 1024), (16,) * 3)}  # fmt: skip
_STALLS = (
    "long_scoreboard",
    "short_scoreboard",
    "barrier",
    "wait",
    "mio_throttle",
    "lg_throttle",
    "math_pipe_throttle",
)
_METRICS = {
    "us": "gpu__time_duration.sum",
    "dram %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    **{name: f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in _STALLS},
}


def once(card: Card, name: str) -> Iterator[dict]:
    """One step of a layer, for Nsight Compute to count."""
    layer = _COUNTED[name]
    small = Layer(40, 64, tuple(64 for _ in layer.members), tuple(r for _, r in layer.members))
    CardMeter(card).branch(small if card.small else layer)[1]()
    wait(card.device)
    yield {"layer": name}


def counters(card: Card) -> Iterator[dict]:
    path = shutil.which("ncu")
    if path is None:
        raise Absent("ncu is not on PATH (it comes with the CUDA toolkit)")
    for name in list(_COUNTED)[-1 if card.small else 0 :]:
        command = [path, "--csv", "--page", "raw", "--kernel-name", "regex:(forward|project|expand|dy|db|x)_kernel"]
        command += ["--metrics", ",".join(_METRICS.values())]
        command += [sys.executable, "-m", "tools.gpu_measure", f"once-{name}"]
        variables = os.environ | {RESULTS: ""}
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
        rows = list(counted(done.stdout))
        for row in rows:
            yield {"layer": name, **row}
        if done.returncode or not rows:
            print(done.stdout)
            yield {"layer": name, "fault": f"ncu: exit status {done.returncode}, {len(rows)} kernels"}


def counted(text: str) -> Iterator[dict]:
    """Yield what ``ncu --csv --page raw`` says of each kernel. Its second line has the units."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    units, *kernels = list(csv.DictReader(lines[start:])) or [{}]
    for kernel in kernels:
        row = {"kernel": kernel["Kernel Name"].partition("(")[0][-60:]}
        for name, metric in _METRICS.items():
            value = kernel.get(metric, "").replace(",", "")
            scale = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}.get(units.get(metric, ""), 1.0)
            row[name] = round(float(value) * scale, 3) if re.fullmatch(r"[\d.]+", value) else value or "no such metric"
        yield row


def loops(card: Card) -> Iterator[dict]:
    """Steps of layers, relative to their frozen products in the same process."""
    meter = CardMeter(card)
    layers = {"r16": Layer(40, 64, 64, 16)} if card.small else _COUNTED
    for name, layer in layers.items():
        frozen, step = meter.branch(layer)
        taken = seconds_of({"frozen": frozen, "step": step}, card)
        added = taken["step"] / taken["frozen"] - 1
        yield {"variant": _variant(), "layer": name, "step, us": _us(taken["step"]), "added": f"{added:.1%}"}


# --- Which way is the fastest?


def layers(card: Card) -> Iterator[dict]:
    sizes = [tune.Layer(40, 24)] if card.small else [tune.Layer(4096, 4096), tune.Layer(4096, 14336)]
    ranks, rows = ((6,), (30,)) if card.small else ((16, 64, 128), (8192, 2048, 64, 1))
    return _ways(card, [(layer, r, m) for layer, r, m in product(sizes, ranks, rows)])


def experts(card: Card) -> Iterator[dict]:
    if card.small:
        return _ways(card, [(tune.Layer(40, 24, 3), 6, 30)])
    return _ways(card, [(tune.Layer(k, n, e), 16, TOKENS * top_k) for e, top_k, n, k in PARAMETERS.values()])


def _ways(card: Card, sizes: Iterable[tuple[tune.Layer, int, int]]) -> Iterator[dict]:
    """Every way to take a layer, as --tune measures them, beside what is chosen without."""
    device = torch.device(card.device, 0) if card.device == "cuda" else torch.device(card.device)

    def by_this_machine(steps: tune.Steps) -> dict[str, float]:
        return {name: _us(seconds) for name, seconds in seconds_of(steps, card).items()}

    clock = tune.interleaved(device) if card.device == "cuda" else by_this_machine
    tiles: dict[tuple[tune.Layer, int], tune.Tiles] = {}  # found with the most rows, which come first
    for layer, r, m in sizes:
        case = tune.Case(layer, r, m, card.dtype, torch.float32)
        entry, left_out = tune.measure(case, device, clock, tiles.get((layer, r), () if card.small else None))
        tiles[layer, r] = entry.tiles
        row = {"layer": str(layer), "r": r, "rows": m, "chosen": tune.chosen(case, device), "fastest": entry.fastest}
        row |= {f"{name}, us": round(us, 1) for name, us in entry.us.items()}
        yield row | ({"fault": left_out[0]} if left_out else {})


def block(card: Card) -> Iterator[dict]:
    """A step of a transformer block in a CUDA graph, adapters on all of its linear layers."""
    hidden, intermediate, m, r = (64, 96, 16, 4) if card.small else (4096, 14336, 8192, 16)
    case = Case(
        "model", f"{hidden}x{intermediate}", m, hidden, intermediate, r, False, "bf16", "f32", 0.5, "silu", 0.0,
        card.device,
    )  # fmt: skip
    operands, known, steps = (
        transformer.Operands.of(transformer.transformer(case.layer), case),
        providers.providers(),
        {},
    )
    for name in ("frozen", "peft", "eager", "afa", "afa.cuda", "afa.triton", "afa.torch"):
        why = known[name].absent(case) if name in known else "not on this machine"
        if why:
            yield {"provider": name, "us": why}
            continue
        step = transformer.Step(known[name], case, operands)
        with beside(card.device):
            step()
        wait(card.device)
        _, steps[name] = in_graph(lambda step=step: step() or (), card.device)
    taken = seconds_of(steps, card)
    for name, seconds in taken.items():
        added = seconds / taken["frozen"] - 1
        yield {"provider": name, "us": _us(seconds), "over frozen": f"{added:+.1%}"}


def tune_command(card: Card) -> Iterator[dict]:
    """The command itself, which has to write its file."""
    if card.device != "cuda":
        raise Absent("--tune measures cards alone")
    folder = Path(os.environ.get(RESULTS, "").rpartition(":")[0] or "outputs/gpu-check/_").parent
    variables = os.environ | {measured.FOLDER_VARIABLE: str(folder)}
    command = [sys.executable, "-m", "afa_kernels", "--tune", "4096x4096,8x4096x14336", "--tokens", "8192"]
    done = subprocess.run(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        yield {"said": line}
    if done.returncode:
        yield {"fault": f"exit status {done.returncode}"}


STEPS: Steps = {
    "products": products,
    "grouped": grouped,
    "rates": rates,
    "gaps": lambda card: in_variants("launches", _LAUNCHES[-2:] if card.small else _LAUNCHES),
    "launches": launches,
    "model": model,
    "counters": counters,
    "variants": lambda card: in_variants("loops", _LOOPS[:2] if card.small else _LOOPS),
    "loops": loops,
    "layers": layers,
    "experts": experts,
    "block": block,
    "tune": tune_command,
    **{f"once-{name}": partial(once, name=name) for name in _COUNTED},
}

if __name__ == "__main__":
    raise SystemExit(run_step(STEPS, card))
