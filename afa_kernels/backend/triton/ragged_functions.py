"""Device functions of the ragged kernels: which group a program's rows belong to, and what the group brings.

The offsets are read here and nowhere on the host. ``ends_ptr`` points to them: (G,) int32, where each group ends.
Values that break their contract give wrong results, but no access outside of x.
"""

import triton
import triton.language as tl

# Arguments whose other value, alignment or stride must not compile another kernel.
OF_ROWS = ("M", "G", "ends_ptr", "ranks_ptr")
OF_GROUPS = ("alpha_ptr", "stride_alpha", "scaling_ptr", "stride_scaling")
_ENDS_AT_A_TIME = tl.constexpr(256)


@triton.jit
def _group_rank(ranks_ptr, group, G, r):
    """Return the rank of a group: r without ``ranks_ptr``, 0 where there is no such group."""
    if ranks_ptr is not None:
        return tl.minimum(tl.load(ranks_ptr + group, mask=group < G, other=0), r)
    else:
        return tl.where(group < G, r, 0)


@triton.jit
def rows_of(group, ends_ptr, ranks_ptr, M, G, r):
    """Return the first row of a group, the row behind its last one, and its rank. Group G is the rows behind the last
    offset, whose rank is 0."""
    first = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group, mask=group < G, other=M)
    return tl.maximum(first, 0), tl.minimum(end, M), _group_rank(ranks_ptr, group, G, r)


@triton.jit
def find_tile(ends_ptr, ranks_ptr, M, G, r, BLOCK_M: tl.constexpr):
    """Return the tile of rows that this program takes: its group, the rank of that, which is 0 for rows without a
    branch, its first row (int64) and its rows.

    The tiles of a group begin at its first row, as in a call with that group alone. Its first tile has the number
    ``first row // BLOCK_M + group``: then no two groups share a number, M // BLOCK_M + G + 1 programs are enough, and a
    program finds its group by counting those that begin no later. Numbers between two groups have no rows (0 or less).
    """
    tile = tl.program_id(0)
    group = 0
    for first in range(0, G, _ENDS_AT_A_TIME):
        earlier = first + tl.arange(0, _ENDS_AT_A_TIME)
        end = tl.load(ends_ptr + earlier, mask=earlier < G, other=M)
        group += tl.sum((end // BLOCK_M + earlier + 1 <= tile).to(tl.int32))
    first, end, rank = rows_of(group, ends_ptr, ranks_ptr, M, G, r)
    number = tile - (first // BLOCK_M + group)
    first_row = first + number * BLOCK_M
    rows_left = tl.where(number >= 0, tl.minimum(end - first_row, BLOCK_M), 0)
    return group, rank, first_row.to(tl.int64), rows_left


@triton.jit
def own(small_ptr, group, stride_group):
    """Return a pointer to the matrix of a group."""
    return small_ptr + group.to(tl.int64) * stride_group


@triton.jit
def own_alpha(alpha_ptr, group, stride_alpha, ACT: tl.constexpr):
    """:func:`load_alpha` of a group."""
    if ACT == "identity":
        return 0.0
    else:
        return tl.load(alpha_ptr + group * stride_alpha)


@triton.jit
def own_scaling(scaling_ptr, group, stride_scaling, scaling):
    """Return the scaling of a group: ``scaling`` without ``scaling_ptr``."""
    if scaling_ptr is not None:
        scaling = tl.load(scaling_ptr + group * stride_scaling)
    return scaling


@triton.jit
def own_factor(scaling_ptr, group, stride_scaling, factor, threshold):
    """Return the scaling of a group over what dropout keeps, rounded once, as ``factor`` was on the host."""
    if scaling_ptr is not None:
        scaling = tl.load(scaling_ptr + group * stride_scaling)
        factor = tl.div_rn(scaling * 256.0, 256.0 - threshold)
    return factor


@triton.jit
def rows_of_part(first, end, part, chunks, chunks_per_part, BLOCK_M: tl.constexpr):
    """Return what one program of a group's rows goes over: its first row, the row behind its last, and the tiles of a
    chunk.

    The sums over a group's rows are cut into chunks as those of a call with that group alone: at most ``chunks``.
    """
    tiles_per_chunk = tl.cdiv(tl.cdiv(end - first, BLOCK_M), chunks)
    rows_per_part = chunks_per_part * tiles_per_chunk * BLOCK_M
    first += part * rows_per_part
    return first, tl.minimum(first + rows_per_part, end), tiles_per_chunk


@triton.jit
def parts_with_rows(first, end, chunks, chunks_per_part, rows_per_tile):
    """Return how many parts :func:`rows_of_part` finds rows for."""
    tiles = tl.cdiv(end - first, rows_per_tile)
    tiles_per_part = chunks_per_part * tl.cdiv(tiles, chunks)
    return tl.cdiv(tiles, tl.maximum(tiles_per_part, 1))
