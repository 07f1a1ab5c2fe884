"""What an H100 would make of a ragged call of the ``cuda`` backend, rows sorted by group such as those of a mixture of
experts: MODELLED, nothing here was measured.

Kernels, times and assumptions are those of cuda_launches.py. What groups change:

- A kernel has a block for each piece of the rows of a group, and pieces differ in length. Blocks start in their order,
  each where one has ended, and share the memory's rate, of which a block alone on its multiprocessor takes no more than
  its share. So the last ones may leave others idle.
- Some blocks find no rows and leave; they cost what the load of the ends takes.
- The frozen products are grouped ones, which cannot add to what is there: the branch reads y, and in the backward dx,
  and adds to it.

The bytes are those that the compiled kernels move, but for the few by which a block finds its group
(python_tests/test_ragged_traffic.py).
"""

import heapq
import math
from typing import NamedTuple

from bench.model.cuda_launches import (
    FLOAT,
    H100,
    HALF,
    SLAB,
    SLAB_RANK,
    SUMS_AT_ONCE,
    Gpu,
    Kernel,
    Overhead,
    Range,
    in_a_row,
    planner,
    rank_class,
)
from bench.shapes import Experts

_PAD = 8  # elements between the rows of a tile (csrc/cuda/tiles.h)
_FINDING = 2  # loads that wait for each other before a block asks for its first tile
_DH_BYTES = 36 << 20  # kRaggedDhBytes (csrc/cuda/ragged_plan.h)
_CHUNKS_AT_ONCE = 4  # partial results that a thread of the sum kernel has under way


class Ragged(NamedTuple):
    """The branch of one layer, forward and backward, on the rows of each group."""

    rows: tuple[int, ...]
    k: int
    n: int
    r: int
    behind: int = 0  # rows of no group

    @staticmethod
    def routed(experts: Experts, rows: int, r: int) -> "Ragged":
        return Ragged(tuple(experts.rows(rows)), experts.k, experts.n, r)

    @property
    def m(self) -> int:
        return sum(self.rows) + self.behind

    @property
    def rank(self) -> int:
        return rank_class(self.r)

    def pieces(self, rows: int, *, chunks: bool = False) -> list[int]:
        """Return the rows of each block of a slab, ``rows`` at most. Of ``chunks`` an empty group has one, too."""
        each = list(self.rows) + ([self.behind] if self.behind else [])
        return [
            min(rows, size - start) for size in each for start in range(0, size or int(chunks), rows)
        ]  # fmt: skip

    def slots(self, rows: int) -> int:
        """Return how many blocks a slab has, those without rows included (``slots_of`` in ragged_plan.h)."""
        return self.m // rows + len(self.rows) + 1


def kernels(
    call: Ragged, gpu: Gpu = H100, *, float_weights: bool = True, reads_base: bool = True, adds_dx: bool = True
) -> tuple[list[Kernel], list[Kernel]]:
    """Return the kernels of the forward and of the backward, in order."""
    limits = (gpu.multiprocessors, gpu.shared_per_block, gpu.shared_per_multiprocessor)
    m, k, n, r, rank = call.m, call.k, call.n, call.r, call.rank
    sizes, groups = (m, k, n, r), len(call.rows)
    planned = {row["kernel"]: row for row in planner().ragged_kernels(sizes, groups, *limits, float_weights)}
    weight, own = FLOAT if float_weights else HALF, sum(call.rows)
    x, dx, y, dy, z, dz = (HALF * size for size in (own * k, m * k, m * n, own * n, m * r, m * rank))
    row_tile, chunk_rows = 128 if rank == 128 else 64, 32 * rank
    tiles = sum(math.ceil(rows / row_tile) for rows in call.rows)
    chunks = sum(max(1, math.ceil(rows / chunk_rows)) for rows in call.rows)  # an empty group has one, of no rows
    several = sum(math.ceil(rows / chunk_rows) for rows in call.rows if rows > chunk_rows)
    one = sum(rows <= chunk_rows for rows in call.rows)

    def made(
        name: str, pieces: list[int], slots: int, columns: int, hbm: int, l2: int, waits: int = 1, empty: int = 0
    ) -> Kernel:
        row = planned[f"ragged_{name}"]
        launches, fit = row["launches"], row["blocks_per_sm"]
        places = fit * gpu.multiprocessors
        at_once = math.ceil(columns / launches)
        lengths = [length for length in pieces for _ in range(at_once)]
        resident = min(fit, math.ceil(len(lengths) / gpu.multiprocessors))
        waves = len(lengths) / places
        # Loads that nothing hides: of blocks that find no rows, and of those that begin alone on their multiprocessor.
        found = (slots - len(pieces)) * at_once / places
        under_way = (row["stage_bytes"] - empty) * (row["stages"] - 1)
        enough = min(fit, math.ceil(gpu.memory.good * gpu.latency.bad / gpu.multiprocessors / under_way))
        return Kernel(
            name, (len(pieces), at_once), launches, row["stages"], fit, waves, hbm, l2, resident * under_way, waits,
            busy=busy_share(lengths, places, enough * gpu.multiprocessors),
            found=launches * (found + (_FINDING * waves if resident == 1 else 0.0)),
        )  # fmt: skip

    def rows_made(name: str, hbm: int, l2: int, columns: int = 1, waits: int = 1) -> Kernel:
        return made(name, call.pieces(row_tile), call.slots(row_tile), columns, hbm, l2, waits)

    def chunks_made(name: str, slabs: int, hbm: int, l2: int, empty: int = 0) -> Kernel:
        pieces = call.pieces(chunk_rows, chunks=True)
        return made(name, pieces, call.slots(chunk_rows), slabs, hbm, l2, empty=empty)

    def small(name: str, l2: int, sums: int, launches: int = 1, at_once: int = SUMS_AT_ONCE) -> Kernel:
        return Kernel(name, (0, 0), launches, 0, 0, 0.0, 0, l2, 0, math.ceil(sums / at_once))

    def chunks_summed(l2: int, launches: int) -> Kernel:
        return small("sum", l2, math.ceil(max(call.rows) / chunk_rows), launches, _CHUNKS_AT_ONCE)

    a, b = tiles * weight * r * k, tiles * weight * n * r
    outputs = y * (2 if reads_base else 1) + z
    forward, backward = [], []
    if "ragged_forward" in planned:
        forward.append(rows_made("forward", x + outputs, a + b))
    else:
        splits, columns = planned["ragged_project"]["grid"][1], planned["ragged_expand"]["grid"][1]
        partial = splits * m * rank * FLOAT
        depth = 128 if rank <= 32 else 64
        fetches = math.ceil(math.ceil(k / splits / depth) / (planned["ragged_project"]["stages"] - 1))
        forward.append(rows_made("project", x, a + partial, splits, fetches))
        forward.append(rows_made("expand", outputs, b + columns * partial, columns))

    def sums(width: int, slab: int, rounds: int) -> tuple[int, int]:
        """Return the bytes of the sums over rows that a pass writes, and those that the sum kernel moves."""
        padded = math.ceil(math.ceil(width / slab) / rounds) * rounds * slab
        partial = several * FLOAT * rank * padded
        return one * weight * r * width + partial, several * FLOAT * r * width + (groups - one) * weight * r * width

    x_slab = {16: 512, 32: 256}.get(rank, 128)
    x_rounds = planned["ragged_x"]["launches"]
    da, da_left = sums(k, x_slab, x_rounds)
    if "ragged_dy" in planned:
        slabs, rounds = math.ceil(n / SLAB), planned["ragged_dy"]["launches"]
        db, db_left = sums(n, SLAB, rounds)
        part, own_part = m * rank * FLOAT, own * rank * FLOAT  # of the sums of dh
        backward.append(
            chunks_made("dy", slabs, dy, chunks * weight * n * r + slabs * (HALF * own * r + own_part) + db)
        )
        carries = slabs * part > _DH_BYTES
        per_round = math.ceil(slabs / rounds)
        if carries:
            read = (rounds - 1) * per_round + rounds - 2
            backward.append(small("reduce", (read + rounds - 1) * part, per_round + 1, rounds - 1))
        parts = slabs - (rounds - 1) * per_round + 1 if carries else slabs
        if several and rounds > 1:
            backward.append(chunks_summed(db_left, rounds))
            db_left = 0
        backward.append(small("rows", parts * own_part + z + dz, parts))
    else:
        parts = planned["ragged_project_dy"]["grid"][1]
        slabs, rounds = math.ceil(n / x_slab), planned["ragged_db"]["launches"]
        db, db_left = sums(n, x_slab, rounds)
        without = 1  # sums of dh of a row without a branch
        if parts > 1:
            without = math.ceil(n / SLAB)
            parts = math.ceil(n / _segment(n)) if r > SLAB_RANK else without
        written = (parts * own + without * (m - own)) * rank * FLOAT
        backward.append(rows_made("project_dy", dy, b + written, parts))
        backward.append(small("rows", parts * own * rank * FLOAT + z + 2 * dz, parts))
        backward.append(chunks_made("db", slabs, dy, slabs * HALF * own * rank + db))
    x_slabs = math.ceil(k / x_slab)
    empty = 0
    if adds_dx:  # rows of no group keep what they hold; dx takes half the rows of x, and those of dz stay empty
        dx, dz = 2 * x, HALF * own * rank
        empty = HALF * (16 if rank in (16, 128) else 32) * (rank + _PAD)
    backward.append(chunks_made("x", x_slabs, x + dx, chunks * weight * r * k + x_slabs * dz + da, empty))
    if several:
        backward.append(chunks_summed(da_left + db_left, max(x_rounds, rounds if db_left else 1)))
    return in_a_row(forward), in_a_row(backward)


def _segment(width: int) -> int:
    """Return the columns that are summed for themselves (``segment_of`` in csrc/cuda/plan.h)."""
    return math.ceil(math.ceil(width / 256) / 8) * 256


def busy_share(lengths: list[int], places: int, enough: int) -> float:
    """Return the share of the time of a kernel in which its blocks use what the memory gives. They start in their
    order, each where one has ended; ``enough`` of them are as fast together as ``places``, fewer are slower."""
    if not sum(lengths):
        return 1.0
    running: list[float] = []  # where each block ends, by the rows that one has streamed that runs from the start on
    streamed = time = 0.0

    def finish() -> None:
        nonlocal streamed, time
        speed = min(1.0, enough / len(running))
        end = heapq.heappop(running)
        time += (end - streamed) / speed
        streamed = end

    for length in lengths:
        if len(running) == places:
            finish()
        heapq.heappush(running, streamed + length)
    while running:
        finish()
    return sum(lengths) / (min(enough, len(lengths)) * time)


def overhead(call: Ragged, gpu: Gpu = H100, *, float_weights: bool = True) -> Overhead:
    """Return what the branch adds to the two grouped products, in percent of them."""
    forward, backward = kernels(call, gpu, float_weights=float_weights)
    each = [
        Range(*(100 * sum(one.seconds(gpu, which)[0] for one in direction) / product(call, gpu, which)
                for which in ("good", "bad")))
        for direction in (forward, backward)
    ]  # fmt: skip
    return Overhead(*each, Range(*((each[0][i] + each[1][i]) / 2 for i in (0, 1))))


def product(call: Ragged, gpu: Gpu, which: str) -> float:
    """Return the seconds of a grouped product of the frozen weights: its arithmetic at the rate of a GEMM whose tiles
    of 128 rows are not all full, or its operands, those of each group that has rows."""
    rows = sum(math.ceil(size / 128) * 128 for size in call.rows)
    weights = sum(size > 0 for size in call.rows) * call.k * call.n
    moved = HALF * (call.m * (call.k + call.n) + weights)
    return max(2 * rows * call.k * call.n / gpu.gemm, moved / getattr(gpu.memory, which))
