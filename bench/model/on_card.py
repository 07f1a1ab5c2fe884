"""What the model says of an H100 beside what a card takes: its assumptions, the kernels, a layer, layers that share x,
and decoding.

A meter brings the times: meter.py on a card, a synthetic one in the tests. Each figure is compared with the
range that the model gives it, on both sides: a kernel that is faster than modelled shows a wrong model, too. Beside the
range stands what the model says with the measured assumptions in the place of its own: where that agrees with the card,
an assumption was wrong, and where it does not, the model is.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from bench.model import cuda_launches
from bench.model.__main__ import RANKS, SHARED
from bench.model.cuda_launches import H100, Gpu, Kernel, Layer, Range, decoding

M, K, N = 8192, 4096, 4096
LONE = {f"a layer, r={r}": Layer(M, K, N, r) for r in RANKS}
TOGETHER = {name: Layer(M, k, n, (16,) * len(n)) for name, (k, n) in SHARED.items()}
# With alpha_t: the model has the same kernels at identity.
TAXED = (
    ("a layer", LONE["a layer, r=16"], 0.5),
    ("a layer at identity", LONE["a layer, r=16"], 0.0),
    *((name, layer, 0.5) for name, layer in TOGETHER.items()),
)
TOKEN = Layer(1, K, N, 16)

# A pass over the larger ones goes to memory, over the smaller ones to L2; the difference of two has no launch in it.
MEMORY_BYTES, L2_BYTES = (256 << 20, 1 << 30), (4 << 20, 12 << 20)
_GEMM_MARGIN = 0.05  # the model has one rate for GEMMs, and no range
_HALF = 2
_US, _PERCENT = "us", "% of the frozen products"


class Meter(Protocol):
    """What a card takes, in seconds."""

    def mapped(self, nbytes: int) -> float:
        """An elementwise kernel that reads ``nbytes`` and writes as many, again and again on the same tensors."""

    def load(self) -> float:
        """A load that waits for the one before it, with the memory busy."""

    def launch(self) -> float:
        """A kernel that does next to nothing, after another one in a graph, without programmatic dependent launch."""

    def hidden(self) -> float:
        """What programmatic dependent launch takes off a launch in a graph."""

    def gemm(self, m: int, k: int, n: int) -> tuple[float, float]:
        """A product of the frozen layer, and one that is added to its output."""

    def kernels(self, layer: Layer) -> tuple[dict[str, float], dict[str, float]]:
        """The kernels of the branch in a forward and in a backward, summed by the names of the model."""

    def step(self, layer: Layer, alpha_t: float) -> tuple[float, float]:
        """Forward and backward of the layer with its branch, and the frozen products alone."""

    def token(self, layer: Layer) -> tuple[float, float]:
        """One call in a graph with the branch, and the frozen product alone; the weights come from memory."""


class Figure(NamedTuple):
    """A figure of the model: its range, what the measured assumptions make of it, and what the card takes."""

    name: str
    unit: str
    modelled: Range
    with_measured: float | None  # None for an assumption
    measured: float

    @property
    def off(self) -> float:
        """How far the card is outside of the range, relative to its nearer end; 0 inside."""
        low, high = sorted(self.modelled)
        end = min(max(self.measured, low), high)
        if not end:  # a kernel that the model does not know
            return math.inf if self.measured else 0.0
        return (self.measured - end) / end

    @property
    def row(self) -> dict[str, str]:
        low, high = sorted(self.modelled)
        return {
            "figure": self.name,
            "unit": self.unit,
            "modelled": f"{low:.3g} to {high:.3g}",
            "with measured assumptions": "" if self.with_measured is None else f"{self.with_measured:.3g}",
            "measured": f"{self.measured:.3g}",
            "verdict": _verdict(self.off),
        }


def _verdict(off: float) -> str:
    if math.isinf(off):
        return "not modelled"
    return f"off by {off:+.0%}" if off else "ok"


def measured_gpu(meter: Meter, assumed: Gpu = H100) -> Gpu:
    """Return ``assumed`` with what the card shows in the place of what was assumed."""
    memory, l2 = (_rate(meter, sizes) for sizes in (MEMORY_BYTES, L2_BYTES))
    product, added = meter.gemm(M, K, N)
    unhidden = (added - product) * memory / (_HALF * M * N)
    latency, launch, hidden = meter.load(), meter.launch(), meter.hidden()
    return assumed._replace(
        gemm=2 * M * K * N / product,
        **{
            name: Range(value, value)
            for name, value in (
                ("memory", memory), ("l2", l2), ("latency", latency), ("launch", launch), ("hidden", hidden),
                ("unhidden", unhidden),
            )
        },
    )  # fmt: skip


def _rate(meter: Meter, sizes: tuple[int, int]) -> float:
    """Return bytes per second, read and written, of what one size takes longer than the other."""
    less, more = sizes
    seconds = meter.mapped(more) - meter.mapped(less)
    return 2 * (more - less) / seconds if seconds > 0 else math.inf


def assumptions(measured: Gpu, assumed: Gpu = H100) -> Iterator[Figure]:
    for name, scale, unit in (
        ("memory", 1e-12, "TB/s"), ("l2", 1e-12, "TB/s"), ("latency", 1e6, _US), ("launch", 1e6, _US),
        ("hidden", 1e6, _US), ("unhidden", 1, "of the read"),
    ):  # fmt: skip
        given, found = getattr(assumed, name), getattr(measured, name)
        yield Figure(name, unit, Range(*(value * scale for value in given)), None, found.good * scale)
    rates = Range(*(assumed.gemm * 1e-12 * (1 + margin) for margin in (_GEMM_MARGIN, -_GEMM_MARGIN)))
    yield Figure("gemm", "TFLOP/s", rates, None, measured.gemm * 1e-12)


def durations(layer: Layer, gpu: Gpu) -> tuple[dict[str, Range], dict[str, Range]]:
    """Return what the model gives the kernels of a forward and of a backward from start to end, in seconds.

    A kernel behind one of ours counts from the end of that one, as in meter.by_kernel.
    """

    def seconds(kernel: Kernel, which: str) -> float:
        return kernel.seconds(gpu, which)[0] - (kernel.launches - kernel.behind) * getattr(gpu.launch, which)

    directions = []
    for direction in cuda_launches.kernels(layer, gpu):
        summed: dict[str, Range] = {}
        for kernel in direction:
            good, bad = summed.get(kernel.name, Range(0.0, 0.0))
            summed[kernel.name] = Range(good + seconds(kernel, "good"), bad + seconds(kernel, "bad"))
        directions.append(summed)
    return tuple(directions)


def kernel_figures(meter: Meter, name: str, layer: Layer, measured: Gpu) -> Iterator[Figure]:
    taken = meter.kernels(layer)
    for direction, modelled, refit, found in zip(
        ("forward", "backward"), durations(layer, H100), durations(layer, measured), taken, strict=True
    ):
        # A kernel that is modelled and not launched takes no time, one that is launched and not modelled has none.
        for kernel in (*modelled, *(found.keys() - modelled.keys())):
            nothing = Range(0.0, 0.0)
            good, bad = modelled.get(kernel, nothing)
            yield Figure(
                f"{name}: {kernel}, {direction}", _US, Range(good * 1e6, bad * 1e6),
                refit.get(kernel, nothing).good * 1e6, found.get(kernel, 0.0) * 1e6,
            )  # fmt: skip


def compare(meter: Meter) -> Iterator[Figure]:
    """Yield every figure of the model with what the card takes."""
    measured = measured_gpu(meter)
    yield from assumptions(measured)
    for name, layer in (LONE | TOGETHER | {"one token": TOKEN}).items():
        yield from kernel_figures(meter, name, layer, measured)
    for name, layer, alpha_t in TAXED:
        modelled, refit = (cuda_launches.overhead(layer, gpu).both for gpu in (H100, measured))
        yield Figure(f"{name}: tax", _PERCENT, modelled, refit.good, _added(*meter.step(layer, alpha_t)))
    modelled, refit = decoding(TOKEN), decoding(TOKEN, measured)
    yield Figure("one token, in a graph", _PERCENT, modelled, refit.good, _added(*meter.token(TOKEN)))


def _added(whole: float, frozen: float) -> float:
    return 100 * (whole / frozen - 1)
