"""``python -m tools.gpu_measure STEP``: the steps of gpu_check that measure. Each is a process of its own.

Times are medians of interleaved rounds in one process, on random data: products of zeros run faster.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
import triton
import triton.language as tl

from afa_kernels import torch_private, tune
from afa_kernels.backend import measured
from bench import providers, transformer
from bench.graphs import beside, in_graph, wait
from bench.model import on_card
from bench.model.cuda_launches import H100, Layer
from bench.model.experts import PARAMETERS, TOKENS
from bench.model.meter import CardMeter, half, seconds_of
from bench.shapes import Case
from tools.gpu_check import RESULTS, ROOT, Absent, Steps, run_step
from tools.gpu_right import Card, card

VARIANT = "AFA_CUDA_VARIANT"  # csrc/cuda/host/variant.h
_LAUNCHES = ("", "overlap=0", "carveout=-1", "overlap=0 carveout=-1")
_LOOPS = ("", "stages=2", "stages=3", "stages=4", "chunks=4", "chunks=8", "chunks=32")


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
