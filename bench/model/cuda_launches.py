"""What an H100 would make of the launches of the ``cuda`` backend: bytes, bytes under way, waves, and the time that
follows. MODELLED, nothing here was measured.

The launches are those that the backend plans, for the dtypes of PEFT: x in 16 bits, A and B in float32. The bytes are
those that the compiled kernels move, as counted on the PTX machine (python_tests/test_cuda_traffic.py).

    time of a kernel = gap before it + the longest of
        memory      HBM bytes / memory rate
        L2          (HBM + L2 bytes) / L2 rate, or that of the multiprocessors that have a block
        latency     HBM bytes / (bytes under way on all multiprocessors / latency), at least one latency for each load
                    that waits for another one
    the second term divided by the full share of the last wave
    then, where the last block of a slab adds up the partial results of all: one latency until it knows that it is the
    last, and the longer of its bytes / the L2 rate of one multiprocessor and a latency for each two chunks
    gap              launch; behind another kernel of this package less what programmatic dependent launch hides of it,
                     but at least one latency: the kernel waits until it can see what the one before it wrote

HBM counts x, dy, y, dx and z; everything else (A, B, dz, partial sums, and every repeated read) counts as L2.
"""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

from afa_kernels.backend import native

HALF, FLOAT = 2, 4
SUMS_AT_ONCE = 16  # partial results that a thread of the reduce kernel has under way (kSumsAtOnce)


class Range(NamedTuple):
    """An assumption, or what follows from some: the value that is good for us, and the one that is bad."""

    good: float
    bad: float


class Gpu(NamedTuple):
    """What the model assumes of a GPU."""

    name: str
    multiprocessors: int
    shared_per_block: int  # bytes
    shared_per_multiprocessor: int
    memory: Range  # bytes per second
    l2: Range  # bytes per second, those from memory included
    latency: Range  # seconds from a load's issue to its data, with the memory busy
    launch: Range  # seconds from the end of a kernel to the start of the one that depends on it
    hidden: Range  # seconds of these that programmatic dependent launch takes away
    gemm: float  # FLOP/s of the frozen layer's GEMM
    unhidden: Range  # share of the time of reading its third operand that a GEMM with beta = 1 takes longer
    l2_alone: float  # bytes per second that one multiprocessor takes from L2


# 3.0 TB/s and 798 TFLOP/s were measured on such a card, by others. So were 0.96 us hidden between two empty kernels at
# 1755 MHz, as the most that can be (github.com/pegainfer-project/pegainfer/issues/569); half of it is assumed where the
# blocks of the kernel before make room late. The rest is assumed.
H100 = Gpu(
    "H100", 132, 227 << 10, 228 << 10, Range(3.1e12, 2.9e12), Range(6.5e12, 4.5e12), Range(0.6e-6, 1.0e-6),
    Range(1.0e-6, 3.0e-6), Range(0.96e-6, 0.48e-6), 798e12, Range(0.15, 0.45), 64 * 1.755e9,
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
    found: float = 0.0  # loads by which blocks look for their work, one after the other, where nothing hides them
    summed: tuple[int, int] = (0, 0)  # bytes that the last block of a slab adds up, and loads that wait

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
        if self.under_way:
            busy = min(gpu.multiprocessors, self.grid[0] * self.grid[1])
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
        return launch + self.found * value(gpu.latency) + taken + self.sum_seconds(gpu, which), bound

    def sum_seconds(self, gpu: Gpu, which: str) -> float:
        """Return the modelled time between the last partial result and the end of the kernel."""
        size, waits = self.summed
        latency = getattr(gpu.latency, which)
        return latency + max(size / gpu.l2_alone, waits * latency) if waits else 0.0


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
    return next(padded for padded in (16, 32, 64, 128) if r <= padded)


def planner():
    """Return the compiled module that plans launches: the CUDA kernels', or the emulator's."""
    if native._C is not None and hasattr(native._C, "cuda"):
        return native._C.cuda
    try:
        return importlib.import_module("afa_kernels._emulator")
    except ImportError:
        raise SystemExit(
            "bench.model: this build has neither CUDA kernels nor the emulator; run make build-tests"
        ) from None


def kernels(layer: Layer, gpu: Gpu = H100, *, float_weights: bool = True) -> tuple[list[Kernel], list[Kernel]]:
    """Return the kernels of the forward and of the backward, in order."""
    limits = (gpu.multiprocessors, gpu.shared_per_block, gpu.shared_per_multiprocessor)
    planned = {row["kernel"]: row for row in planner().launch_plan(tuple(layer), *limits, float_weights)}
    m, k, members = layer.m, layer.k, layer.members
    rank = layer.rank
    weight = FLOAT if float_weights else HALF
    ranks, n = sum(r for _, r in members), sum(n for n, _ in members)
    x, y, z, dz = (HALF * m * columns for columns in (k, n, ranks, rank))
    a, b = weight * k * ranks, weight * sum(n * r for n, r in members)

    def made(name: str, hbm: int, l2: int, waits: int = 1) -> Kernel:
        row = planned[name]
        blocks = row["grid"][0] * row["grid"][1]
        resident = min(row["blocks_per_sm"], math.ceil(blocks / gpu.multiprocessors))
        under_way = resident * row["stage_bytes"] * (row["stages"] - 1)
        return Kernel(
            name, row["grid"], row["launches"], row["stages"], row["blocks_per_sm"], row["waves"], hbm, l2, under_way,
            waits, busy=row["busy"],
        )  # fmt: skip

    def reduce(l2: int, sums: int, launches: int = 1) -> Kernel:
        return Kernel("reduce", (0, 0), launches, 0, 0, 0.0, 0, l2, 0, math.ceil(sums / SUMS_AT_ONCE))

    forward, backward = [], []
    if "forward" in planned:
        forward.append(made("forward", x + y + z, planned["forward"]["grid"][0] * (a + b)))
    else:
        (row_blocks, splits), column_blocks = planned["project"]["grid"], planned["expand"]["grid"][1]
        partial = splits * m * rank * FLOAT
        segment = math.ceil(math.ceil(k / splits) / (128 if rank <= 32 else 64)) if splits > 1 else 1
        fetches = math.ceil(segment / (planned["project"]["stages"] - 1))
        forward.append(made("project", x, row_blocks * a + partial, fetches))
        # Expand: all partial sums at once, while the first tiles of B are under way.
        forward.append(made("expand", y + z, row_blocks * b + column_blocks * partial))
    da_chunks, threads = planned["x"]["grid"][1], planned["x"]["threads"]
    x_slabs = math.ceil(k / {16: 512, 32: 256}.get(rank, 128))
    makes_dz = "dh_sums" in planned["x"]  # in the x kernel, each slab of columns for itself
    rounds = planned["x"]["launches"]
    da = da_chunks * rank * k * FLOAT  # of a round
    da_live = da * ranks // rank
    da_summed = planned["x"].get("sums", 0)
    counters = FLOAT * x_slabs * threads if da_summed > 1 else 0

    def summed(partial: int, live: int, result: int, chunks: int, count: int, counters: int) -> int:
        """Return the bytes of a sum over rows in the kernel that makes the partial results: written by each round and
        read by all but the first, unless the only chunk has the sum in the last one; and where whoever comes last adds
        up those of ``count`` chunks, read once more, in the ranks that there are."""
        if count == 1:
            return 2 * (rounds - 1) * partial - (partial - live if rounds > 1 else 0) + result
        return (2 * rounds - 1) * partial + (live + result + 2 * chunks * counters if count > 1 else 0)

    x_bytes = da_chunks * a + summed(da, da_live, a, da_chunks, da_summed, counters)
    last_sum = da_live // x_slabs
    if "dy" in planned:
        slabs, db_chunks = planned["dy"]["grid"]
        dh, db = slabs * m * layer.dy_rank * FLOAT, db_chunks * n * layer.dy_rank * FLOAT
        z_again = sum(math.ceil(n / 256) * HALF * m * r for n, r in members)
        db_summed = planned["dy"].get("sums", 0)
        db_moved = summed(db, db, b, db_chunks, db_summed, 0)
        backward.append(made("dy", y, db_chunks * b + z_again + dh + db_moved + counters))
        left = 0 if db_summed else db_chunks * FLOAT * sum(n * r for n, r in members) + b
        if not makes_dz:
            parts = max(math.ceil(n / 256) for n, _ in members)
            backward.append(reduce(dh + z + dz + left, max(parts, db_chunks if left else 0), rounds))
            left = 0
        backward.append(made("x", 2 * x, x_bytes + x_slabs * (dh + z if makes_dz else dz)))
    else:
        (row_blocks, splits), db_chunks = planned["project_dy"]["grid"], planned["x"]["db_chunks"]
        row_blocks *= rounds
        slabs, db = math.ceil(n / 128), db_chunks * n * rank * FLOAT
        of_db = FLOAT * slabs * threads if da_summed > 1 else 0
        if splits == 1:
            backward.append(made("project_dy", y, row_blocks * b + z + 2 * dz))
        else:
            dh = splits * m * rank * FLOAT
            backward.append(made("project_dy", y, row_blocks * b + dh + counters + of_db))
            backward.append(reduce(dh + z + 2 * dz, splits, rounds))
        x_bytes += summed(db, db, b, db_chunks, db_chunks if da_summed else 0, of_db)
        left = 0 if da_summed else db * ranks // rank + b
        backward.append(made("x", 2 * x + y, x_bytes + (x_slabs + slabs) * dz))
        last_sum = max(last_sum, db // slabs)
    if da_summed > 1:
        chunks_at_once = 1 if rank == 128 else 2
        backward[-1] = backward[-1]._replace(summed=(last_sum, math.ceil(da_chunks / chunks_at_once)))
    if left or not da_summed:
        da_left, chunks = (0, 0) if da_summed else (da_live + a, da_chunks)
        backward.append(reduce(da_left + left, max(chunks, db_chunks if left else 0)))
    return in_a_row(forward), in_a_row(backward)


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
    return _overhead(layer, gpu, passes, lambda kernel, which: kernel.seconds(gpu, which)[0])


def traffic_alone(layer: Layer, gpu: Gpu = H100) -> Overhead:
    """Return what the large operands would add, each read and written once at the memory's rate, with no launch, no
    latency and no L2: no order of passes adds less."""
    return _overhead(layer, gpu, kernels(layer, gpu), lambda kernel, which: kernel.hbm / getattr(gpu.memory, which))


def _overhead(
    layer: Layer, gpu: Gpu, passes: tuple[list[Kernel], list[Kernel]], seconds_of: Callable[[Kernel, str], float]
) -> Overhead:
    gemm = layer.gemm_flops / gpu.gemm

    def percent(direction: int, which: str) -> float:
        seconds = sum(seconds_of(kernel, which) for kernel in passes[direction])
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
