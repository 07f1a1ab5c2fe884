"""What an H100 would make of the launches of the ``cuda`` backend: bytes, bytes under way, waves, and the time that
follows. MODELLED, nothing here was measured.

The launches are those that the backend plans, for the dtypes of PEFT: x in 16 bits, A and B in float32. The bytes are
those that the compiled kernels move, as counted on the PTX machine (python_tests/gpu/test_cuda_traffic.py).

    time of a kernel = gap before it + the longest of
        memory      HBM bytes / memory rate
        L2          (HBM + L2 bytes) / L2 rate, or that of the multiprocessors that have a block
        latency     HBM bytes / (bytes under way on all multiprocessors / latency), at least one latency for each load
                    that waits for another one
        instructions  HBM bytes / the rate that the instructions of the compiled kernel allow, where it is given
    the second term divided by the full share of the last wave
    gap              launch; behind another kernel of this package less what programmatic dependent launch hides of it,
                     but at least one latency: the kernel waits until it can see what the one before it wrote

HBM counts x, dy, y, dx and z; everything else (A, B, dz, partial sums, and every repeated read) counts as L2.
"""

import importlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from afa_kernels.backend import compiled
from bench.model.gpus import CARDS, Card

HALF, FLOAT = 2, 4
SUMS_AT_ONCE = 16  # partial results that a thread of the reduce kernel has under way (kSumsAtOnce)
SLAB = 512  # columns of dy of which a block makes a partial sum of dh, up to rank 32 (kSlab)


class Range(NamedTuple):
    """An assumption, or what follows from some: the value that is good for us, and the one that is bad."""

    good: float
    bad: float


class Gpu(NamedTuple):
    """What the model assumes of a GPU."""

    card: Card
    memory: Range  # bytes per second
    l2: Range  # bytes per second, those from memory included
    latency: Range  # seconds from a load's issue to its data, with the memory busy
    launch: Range  # seconds from the end of a kernel to the start of the one that depends on it
    hidden: Range  # seconds of these that programmatic dependent launch takes away
    gemm: float  # FLOP/s of the frozen layer's GEMM
    unhidden: Range  # share of the time of reading its third operand that a GEMM with beta = 1 takes longer
    l2_alone: float  # bytes per second that one multiprocessor takes from L2
    # Bytes of x, dy, y and dx per second that the instructions of a kernel allow, by its name and class of ranks: what
    # `python -m tools.cuda_report` reads from the machine code. Empty: not known.
    allowed: Mapping[tuple[str, int], float] = MappingProxyType({})


# 3.0 TB/s and 798 TFLOP/s were measured on such a card, by others. So were 0.96 us hidden between two empty kernels at
# 1755 MHz, as the most that can be (github.com/pegainfer-project/pegainfer/issues/569); half of it is assumed where the
# blocks of the kernel before make room late. The rest is assumed.
H100 = Gpu(
    CARDS["sm_90"], Range(3.1e12, 2.9e12), Range(6.5e12, 4.5e12), Range(0.6e-6, 1.0e-6),
    Range(1.0e-6, 3.0e-6), Range(0.96e-6, 0.48e-6), 798e12, Range(0.15, 0.45), 64 * CARDS["sm_90"].clock,
)  # fmt: skip


class Kernel(NamedTuple):
    """One kernel of a call, as often as it is launched."""

    name: str
    grid: tuple[int, int]
    launches: int
    stages: int
    blocks: int  # that fit on a multiprocessor
    waves: float
    hbm: int  # bytes
    l2: int
    under_way: int  # bytes on a multiprocessor; 0 for the small kernels, which have no ring of tiles
    waits: int = 1  # loads that wait for each other, in a launch
    behind: int = 0  # launches right behind another kernel of this package
    busy: float = 1.0  # share of its time in which the places for blocks are busy, from the first full wave on
    rank: int = 0  # class of the ranks that it is compiled for

    def gaps(self, gpu: Gpu, which: str) -> float:
        """Return the modelled time in which the kernel before has ended and this one has not begun."""
        launch, hidden, latency = (getattr(value, which) for value in (gpu.launch, gpu.hidden, gpu.latency))
        followed = max(launch - hidden, min(launch, latency))
        return (self.launches - self.behind) * launch + self.behind * followed

    def seconds(self, gpu: Gpu, which: str) -> tuple[float, str]:
        """Return the modelled time with the ``good`` or the ``bad`` assumptions, and what bounds it."""

        def value(assumption: Range) -> float:
            return getattr(assumption, which)

        times = {"memory": self.hbm / value(gpu.memory), "L2": (self.hbm + self.l2) / value(gpu.l2)}
        times["latency"] = self.launches * self.waits * value(gpu.latency)
        if (self.name, self.rank) in gpu.allowed:
            times["instructions"] = self.hbm / gpu.allowed[self.name, self.rank]
        if self.under_way:
            busy = min(gpu.card.multiprocessors, self.grid[0] * self.grid[1])
            times["L2"] = max(times["L2"], (self.hbm + self.l2) / (busy * gpu.l2_alone))
            streamed = self.hbm / (busy * self.under_way / value(gpu.latency))
            times["latency"] = max(times["latency"], streamed)
        bound, longest = max(times.items(), key=lambda entry: entry[1])
        launch = self.gaps(gpu, which)
        taken = longest / self.busy
        if launch > taken:
            bound = "launch"
        elif taken - longest > launch and self.busy < 0.9:
            bound = "tail"
        return launch + taken, bound


class Layer(NamedTuple):
    """The branch of one layer, forward and backward; of several that share x where n and r are tuples."""

    m: int
    k: int
    n: int | tuple[int, ...]
    r: int | tuple[int, ...]

    @property
    def members(self) -> list[tuple[int, int]]:
        """N and r of each."""
        return list(zip(*((s if isinstance(s, tuple) else (s,)) for s in (self.n, self.r)), strict=True))

    @property
    def rank(self) -> int:
        """The class of all ranks together, each a multiple of 16."""
        together = sum(math.ceil(r / 16) * 16 for _, r in self.members)
        return rank_class(together if len(self.members) > 1 else self.members[0][1])

    @property
    def dy_rank(self) -> int:
        return rank_class(max(r for _, r in self.members))

    @property
    def gemm_flops(self) -> int:
        return 2 * self.m * self.k * sum(n for n, _ in self.members)


def rank_class(r: int) -> int:
    return next(padded for padded in (16, 32, 64) if r <= padded)


def planner():
    """Return the compiled module that plans launches: the CUDA kernels', or the PTX machine's."""
    if compiled._C is not None and hasattr(compiled._C, "cuda"):
        return compiled._C.cuda
    try:
        return importlib.import_module("afa_kernels._cuda_on_ptx")
    except ImportError:
        raise SystemExit("this build has no CUDA kernels; run make build-tests where nvcc is") from None


def kernels(layer: Layer, gpu: Gpu = H100, *, float_weights: bool = True) -> tuple[list[Kernel], list[Kernel]]:
    """Return the kernels of the forward and of the backward, in order."""
    call = _Call(layer, gpu, float_weights)
    return in_a_row(_pack(call) + _forward(call)), in_a_row(_pack(call) + _backward(call))


class _Call:
    """What is planned for a layer, and the bytes of its operands: of each member together."""

    def __init__(self, layer: Layer, gpu: Gpu, float_weights: bool):
        rows = planner().launch_plan(tuple(layer), *gpu.card.planned_for)
        self.layer, self.gpu = layer, gpu
        self.planned = {row["kernel"]: row for row in rows}
        self.ranks, self.n = (sum(sizes) for sizes in ((r for _, r in layer.members), (n for n, _ in layer.members)))
        self.x, self.y, self.z, self.dz = (
            HALF * layer.m * columns for columns in (layer.k, self.n, self.ranks, layer.rank)
        )
        weight = FLOAT if float_weights else HALF
        # As the caller holds them, and as the kernels read them.
        self.held_a, self.held_b = weight * layer.k * self.ranks, weight * sum(n * r for n, r in layer.members)
        self.packs = float_weights or len(layer.members) > 1 or self.ranks % 8 > 0
        self.a, self.b = self.held_a, self.held_b
        if self.packs:
            self.a, self.b = HALF * layer.k * layer.rank, HALF * self.n * layer.dy_rank

    def made(self, name: str, hbm: int, l2: int, waits: int = 1) -> Kernel:
        row = self.planned[name]
        blocks = row["grid"][0] * row["grid"][1]
        resident = min(row["blocks_per_sm"], math.ceil(blocks / self.gpu.card.multiprocessors))
        under_way = resident * row["stage_bytes"] * (row["stages"] - 1)
        return Kernel(
            name, row["grid"], row["launches"], row["stages"], row["blocks_per_sm"], row["waves"], hbm, l2, under_way,
            waits, busy=row["busy"], rank=self.layer.rank,
        )  # fmt: skip


def _pack(call: _Call) -> list[Kernel]:
    """Return the launch that rounds and pads A and B, if there is one."""
    moved = call.held_a + call.held_b + call.a + call.b
    return [Kernel("pack", (0, 0), 1, 0, 0, 0.0, 0, moved, 0)] if call.packs else []


def _reduce(l2: int, sums: int, launches: int = 1) -> Kernel:
    return Kernel("reduce", (0, 0), launches, 0, 0, 0.0, 0, l2, 0, math.ceil(sums / SUMS_AT_ONCE))


def _forward(call: _Call) -> list[Kernel]:
    layer, planned = call.layer, call.planned
    if "forward" in planned:
        row_blocks, _ = planned["forward"]["grid"]
        return [call.made("forward", call.x + call.y + call.z, row_blocks * (call.a + call.b))]
    (row_blocks, splits), (_, column_blocks) = planned["project"]["grid"], planned["expand"]["grid"]
    partial = splits * layer.m * layer.rank * FLOAT
    segment = math.ceil(math.ceil(layer.k / splits) / (128 if layer.rank <= 32 else 64)) if splits > 1 else 1
    fetches = math.ceil(segment / (planned["project"]["stages"] - 1))
    return [
        call.made("project", call.x, row_blocks * call.a + partial, fetches),
        # All partial sums at once, while the first tiles of B are under way.
        call.made("expand", call.y + call.z, row_blocks * call.b + column_blocks * partial),
    ]


class _Sum(NamedTuple):
    """dA or dB, a sum over rows of which each chunk has a part."""

    partial: int  # bytes of the partial results of a round
    live: int  # those in ranks that there are
    result: int  # bytes of the gradient
    rounds: int

    def moved(self) -> int:
        """Return the bytes in the kernel that makes the partial results: these are written by each round and read by
        all but the first."""
        return (2 * self.rounds - 1) * self.partial

    def left(self) -> int:
        """Return the bytes in the reduce kernel."""
        return self.live + self.result


def _backward(call: _Call) -> list[Kernel]:
    layer, ranks = call.layer, call.ranks
    m, k, rank = layer.m, layer.k, layer.rank
    da_chunks, rounds = call.planned["x"]["grid"][1], call.planned["x"]["launches"]
    partial = da_chunks * rank * k * FLOAT
    da = _Sum(partial, partial * ranks // rank, call.held_a, rounds)
    x_slabs = math.ceil(k / {16: 512, 32: 256}.get(rank, 128))
    x = call.made("x", 2 * call.x, da_chunks * call.a + da.moved() + x_slabs * call.dz)
    if "dy" in call.planned:
        slabs, db_chunks = call.planned["dy"]["grid"]
        dh, partial = slabs * m * layer.dy_rank * FLOAT, db_chunks * call.n * layer.dy_rank * FLOAT
        db = _Sum(partial, db_chunks * FLOAT * sum(n * r for n, r in layer.members), call.held_b, rounds)
        z_again = sum(math.ceil(n / SLAB) * HALF * m * r for n, r in layer.members)
        sums = max(db_chunks, *(math.ceil(n / SLAB) for n, _ in layer.members))
        return [
            call.made("dy", call.y, db_chunks * call.b + z_again + dh + db.moved()),
            _reduce(dh + call.z + call.dz + db.left(), sums, rounds),
            x,
            _reduce(da.left(), da_chunks),
        ]
    (row_blocks, splits), db_chunks = call.planned["project_dy"]["grid"], call.planned["db"]["grid"][1]
    dh, partial = splits * m * rank * FLOAT, db_chunks * call.n * rank * FLOAT
    db = _Sum(partial, partial * ranks // rank, call.held_b, rounds)
    slabs = math.ceil(call.n / 128)
    return [
        call.made("project_dy", call.y, rounds * row_blocks * call.b + dh),
        _reduce(dh + call.z + 2 * call.dz, splits, rounds),
        call.made("db", call.y, slabs * call.dz + db.moved()),
        x,
        _reduce(da.left() + db.left(), max(da_chunks, db_chunks)),
    ]


def in_a_row(kernels: list[Kernel]) -> list[Kernel]:
    """Return the kernels of a direction as they follow each other: the first launch comes behind something else."""
    return [kernel._replace(behind=kernel.launches - (kernel is kernels[0])) for kernel in kernels]


class Overhead(NamedTuple):
    """Modelled time that the branch adds to the two GEMMs of its frozen layer, in percent of them."""

    forward: Range
    backward: Range
    both: Range


def overhead(layer: Layer, gpu: Gpu = H100, *, float_weights: bool = True) -> Overhead:
    passes = kernels(layer, gpu, float_weights=float_weights)
    gemm = layer.gemm_flops / gpu.gemm

    def percent(direction: int, which: str) -> float:
        seconds = sum(kernel.seconds(gpu, which)[0] for kernel in passes[direction])
        # The branch writes y (dx), and the frozen GEMMs accumulate into it: one into each y, all into one dx.
        columns = sum(n for n, _ in layer.members) if direction == 0 else layer.k
        seconds += getattr(gpu.unhidden, which) * HALF * layer.m * columns / getattr(gpu.memory, which)
        return 100 * seconds / gemm

    each = [Range(percent(direction, "good"), percent(direction, "bad")) for direction in (0, 1)]
    both = Range(*((each[0][i] + each[1][i]) / 2 for i in (0, 1)))
    return Overhead(each[0], each[1], both)


def decoding(layer: Layer, gpu: Gpu = H100) -> Range:
    """Return the modelled time that the branch of a forward of few tokens adds to the frozen matrix-vector products in
    a CUDA graph, in percent of them."""
    forward = kernels(layer, gpu)[0]
    weights = HALF * layer.k * sum(n for n, _ in layer.members)

    def percent(which: str) -> float:
        gemv = weights / getattr(gpu.memory, which) + len(layer.members) * getattr(gpu.launch, which)
        return 100 * sum(kernel.seconds(gpu, which)[0] for kernel in forward) / gemv

    return Range(percent("good"), percent("bad"))
