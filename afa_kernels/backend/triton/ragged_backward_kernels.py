"""The Triton kernels of the ragged backward: those of backward_kernels.py for rows sorted by group."""

import triton
import triton.language as tl

from afa_kernels.backend.triton.backward_kernels import dy_tile, load_slab, store_dz, sum_chunks, x_tile
from afa_kernels.backend.triton.device_functions import multiple, project, sum_partials
from afa_kernels.backend.triton.ragged_functions import (
    OF_GROUPS,
    OF_ROWS,
    find_tile,
    own,
    own_alpha,
    own_factor,
    own_scaling,
    parts_with_rows,
    rows_of,
    rows_of_part,
)


@triton.jit(do_not_specialize=[*OF_ROWS, *OF_GROUPS, "segment_tiles", "threshold"])
def ragged_dyb_dphi_backward_kernel(
    dy_ptr, b_ptr, z_ptr, dz_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, M, G, N, r,
    stride_dym, stride_bg, stride_bn, stride_br, stride_alpha, stride_scaling, factor, threshold, segment_tiles,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D1. Grid: (tiles of rows,). Here and below: rows without a branch get no dz, and nothing reads it."""
    group, rank, first_row, rows_left = find_tile(ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if (rows_left <= 0) | (rank == 0):
        return
    alpha_t = own_alpha(alpha_ptr, group, stride_alpha, ACT)
    factor = own_factor(scaling_ptr, group, stride_scaling, factor, threshold)
    dh = project(
        dy_ptr, own(b_ptr, group, stride_bg), first_row, rows_left, 0, tl.cdiv(N, BLOCK_L), segment_tiles, N, rank,
        stride_dym, stride_br, stride_bn, 0, 0, 0,
        BLOCK_M, BLOCK_L, R, RANK_STEP, False, PRECISION,
    )  # fmt: skip
    store_dz(dh, z_ptr, dz_ptr, alpha_t, first_row, rows_left, r, factor, ACT, BLOCK_M, R)


@triton.jit(do_not_specialize=[*OF_ROWS, *OF_GROUPS, "count", "threshold"])
def ragged_dphi_backward_kernel(
    partial_ptr, z_ptr, dz_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, M, G, r, count,
    stride_alpha, stride_scaling, factor, threshold,
    ACT: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """R, first job. Grid: (tiles of rows,)."""
    group, rank, first_row, rows_left = find_tile(ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if (rows_left <= 0) | (rank == 0):
        return
    dh = sum_partials(partial_ptr, first_row, rows_left, M, count, BLOCK_M, R)
    alpha_t = own_alpha(alpha_ptr, group, stride_alpha, ACT)
    factor = own_factor(scaling_ptr, group, stride_scaling, factor, threshold)
    store_dz(dh, z_ptr, dz_ptr, alpha_t, first_row, rows_left, r, factor, ACT, BLOCK_M, R)


@triton.jit(do_not_specialize=[*OF_ROWS, "parts", "chunks", "chunks_per_part", "alpha_ptr", "stride_alpha"])
def ragged_dy_pass_backward_kernel(
    dy_ptr, b_ptr, z_ptr, dh_ptr, db_ptr, ends_ptr, ranks_ptr, alpha_ptr, M, G, N, r, parts, chunks, chunks_per_part,
    stride_dym, stride_bg, stride_bn, stride_br, stride_alpha,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D, with ``db^T`` as partials (G, parts, R, N). Grid: (N / BLOCK_L slabs, parts of groups).

    A part is a chunk of a group's rows, or all of its chunks in order, one sum after the other: then the partial of the
    only part is the group's whole sum, bit for bit what the reduction makes of the chunks.
    """
    slab, group, part = tl.program_id(0), tl.program_id(1) // parts, tl.program_id(1) % parts
    first, end, rank = rows_of(group, ends_ptr, ranks_ptr, M, G, r)
    first, end, tiles_per_chunk = rows_of_part(first, end, part, chunks, chunks_per_part, BLOCK_M)
    if (first >= end) | (rank == 0):
        return
    alpha_t = own_alpha(alpha_ptr, group, stride_alpha, ACT)
    if dh_ptr is not None:
        b = load_slab(
            own(b_ptr, group, stride_bg), slab, rank, N, stride_br, multiple(stride_bn, RANK_STEP),
            dy_ptr.dtype.element_ty, R, RANK_STEP, BLOCK_L,
        )  # fmt: skip
    else:
        b = None
    db = tl.zeros((R, BLOCK_L), tl.float32)
    chunk = tl.zeros((R, BLOCK_L), tl.float32)
    left_in_chunk = tiles_per_chunk
    for start in range(0, end - first, BLOCK_M):
        first_row = first.to(tl.int64) + start
        rows_left = tl.minimum(end - first - start, BLOCK_M)
        chunk = dy_tile(
            chunk, dy_ptr, b, z_ptr, dh_ptr, db_ptr, alpha_t, first_row, rows_left, slab, M, N, r, stride_dym,
            ACT, R, BLOCK_M, BLOCK_L, PRECISION,
        )  # fmt: skip
        left_in_chunk -= 1
        if left_in_chunk == 0:
            db += chunk
            chunk = tl.zeros((R, BLOCK_L), tl.float32)
            left_in_chunk = tiles_per_chunk
    if db_ptr is not None:
        _store_partial(db_ptr, db + chunk, slab, N, R, BLOCK_L)


@triton.jit
def _store_partial(partial_ptr, sums, slab, length, R: tl.constexpr, BLOCK_L: tl.constexpr):
    rank, col = tl.arange(0, R), slab * BLOCK_L + tl.arange(0, BLOCK_L)
    rows = (tl.program_id(1) * R + rank[:, None]).to(tl.int64)
    tl.store(partial_ptr + rows * length + col[None, :], sums, mask=(col < length)[None, :])


@triton.jit(do_not_specialize=[*OF_ROWS, "parts", "chunks", "chunks_per_part", "threshold", "seed_ptr"])
def ragged_x_pass_backward_kernel(
    dz_ptr, a_ptr, x_ptr, dx_ptr, da_ptr, ends_ptr, ranks_ptr, seed_ptr, M, G, K, r, parts, chunks, chunks_per_part,
    stride_ag, stride_ar, stride_ak, stride_xm, threshold, calls_per_row,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    DROPOUT: tl.constexpr, ADDS_DX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X, with ``da`` as partials (G, parts, R, K), in parts as D has them. Grid: (K / BLOCK_L slabs, parts of groups
    and of the rows behind them).

    With ADDS_DX dx is added to, and rows without a branch keep what they hold.
    """
    slab, group, part = tl.program_id(0), tl.program_id(1) // parts, tl.program_id(1) % parts
    first, end, rank = rows_of(group, ends_ptr, ranks_ptr, M, G, r)
    first, end, tiles_per_chunk = rows_of_part(first, end, part, chunks, chunks_per_part, BLOCK_M)
    if first >= end:
        return
    if rank == 0:
        if dx_ptr is not None and not ADDS_DX:
            _store_zeros(dx_ptr, first, end, slab, K, BLOCK_M, BLOCK_L)
        return
    seed = tl.load(seed_ptr) if DROPOUT else 0
    if dx_ptr is not None:
        a = load_slab(
            own(a_ptr, group, stride_ag), slab, rank, K, stride_ar, stride_ak, dz_ptr.dtype.element_ty,
            R, RANK_STEP, BLOCK_L,
        )  # fmt: skip
    else:
        a = None
    da = tl.zeros((R, BLOCK_L), tl.float32)
    chunk = tl.zeros((R, BLOCK_L), tl.float32)
    left_in_chunk = tiles_per_chunk
    for start in range(0, end - first, BLOCK_M):
        first_row = first.to(tl.int64) + start
        rows_left = tl.minimum(end - first - start, BLOCK_M)
        chunk = x_tile(
            chunk, dz_ptr, a, x_ptr, dx_ptr, da_ptr, first_row, rows_left, slab, K, stride_xm, seed,
            threshold, calls_per_row, R, BLOCK_M, BLOCK_L, DROPOUT, PRECISION, ADDS_DX,
        )  # fmt: skip
        left_in_chunk -= 1
        if left_in_chunk == 0:
            da += chunk
            chunk = tl.zeros((R, BLOCK_L), tl.float32)
            left_in_chunk = tiles_per_chunk
    if da_ptr is not None:
        _store_partial(da_ptr, da + chunk, slab, K, R, BLOCK_L)


@triton.jit
def _store_zeros(dx_ptr, first, end, slab, K, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    col = slab * BLOCK_L + tl.arange(0, BLOCK_L)
    zeros = tl.zeros((BLOCK_M, BLOCK_L), dx_ptr.dtype.element_ty)
    for start in range(first, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask = (row < end)[:, None] & (col < K)[None, :]
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * K + col[None, :], zeros, mask=mask)


@triton.jit(
    do_not_specialize=[
        *OF_ROWS,
        "blocks_a",
        "chunks",
        "parts_a",
        "chunks_per_part_a",
        "parts_b",
        "chunks_per_part_b",
        "scaling_ptr",
        "stride_scaling",
    ]
)
def ragged_weight_gradients_kernel(
    da_partial_ptr, db_partial_ptr, da_ptr, db_ptr, ends_ptr, ranks_ptr, scaling_ptr, M, G, K, N, r, blocks_a,
    chunks, parts_a, chunks_per_part_a, rows_per_tile_a, parts_b, chunks_per_part_b, rows_per_tile_b, stride_scaling,
    scaling,
    R: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R, second job: ``da (G, r, K)`` and ``db (G, N, r)``, zero beyond the rank of a group and where it has no rows.

    Grid: (``blocks_a`` blocks of K, then blocks of N; R / RANKS; G).
    """
    block, group = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    first, end, rank = rows_of(group, ends_ptr, ranks_ptr, M, G, r)
    mask, in_rank = (column < r)[:, None], (column < rank)[:, None]
    end = tl.where(rank > 0, end, first)
    if da_ptr is not None:
        if block < blocks_a:
            col = block * BLOCK + tl.arange(0, BLOCK)
            count = parts_with_rows(first, end, chunks, chunks_per_part_a, rows_per_tile_a)
            partial_ptr = da_partial_ptr + group.to(tl.int64) * parts_a * R * K
            da = sum_chunks(partial_ptr, column, col, K, count, R, RANKS, BLOCK)
            da = tl.where(in_rank, da, 0.0).to(da_ptr.dtype.element_ty)
            target = da_ptr + (group.to(tl.int64) * r + column)[:, None] * K + col[None, :]
            tl.store(target, da, mask=mask & (col < K)[None, :])
    if db_ptr is not None:
        if block >= blocks_a:
            col = (block - blocks_a) * BLOCK + tl.arange(0, BLOCK)
            count = parts_with_rows(first, end, chunks, chunks_per_part_b, rows_per_tile_b)
            partial_ptr = db_partial_ptr + group.to(tl.int64) * parts_b * R * N
            scaling = own_scaling(scaling_ptr, group, stride_scaling, scaling)
            db = scaling * sum_chunks(partial_ptr, column, col, N, count, R, RANKS, BLOCK)
            db = tl.where(in_rank, db, 0.0).to(db_ptr.dtype.element_ty)
            target = db_ptr + (group.to(tl.int64) * N + col)[None, :] * r + column[:, None]
            tl.store(target, db, mask=mask & (col < N)[None, :])
