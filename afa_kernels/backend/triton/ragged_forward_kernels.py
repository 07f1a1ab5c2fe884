"""The Triton kernels of the ragged forward: those of forward_kernels.py for rows sorted by group, where what holds for
all of them stands. Here a is (G, r, K) and b (G, N, r), and each program finds its group (ragged_functions.py)."""

import triton
import triton.language as tl

from afa_kernels.backend.triton.device_functions import phi, project, sum_partials
from afa_kernels.backend.triton.forward_kernels import copy_padded, store_y, store_z
from afa_kernels.backend.triton.ragged_functions import (
    OF_GROUPS,
    OF_ROWS,
    find_tile,
    own,
    own_alpha,
    own_scaling,
    rows_of,
)


@triton.jit(do_not_specialize=[*OF_ROWS])
def ragged_pack_kernel(
    a_ptr, b_ptr, a_padded_ptr, b_padded_ptr, ends_ptr, ranks_ptr, blocks_a, M, G, K, N, r,
    stride_ag, stride_ar, stride_ak, stride_bg, stride_bn, stride_br,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round the a and b of each group that has rows, with zeros where its rank ends. Grid: (blocks of a, then of b;
    G)."""
    block, group = tl.program_id(0), tl.program_id(1)
    first, end, rank = rows_of(group, ends_ptr, ranks_ptr, M, G, r)
    if (end <= first) | (rank == 0):
        return
    group = group.to(tl.int64)
    if block < blocks_a:
        copy_padded(
            a_ptr + group * stride_ag, a_padded_ptr + group * K * R, block, rank, K, R, K, stride_ar, stride_ak,
            BLOCK,
        )  # fmt: skip
    else:
        copy_padded(
            b_ptr + group * stride_bg, b_padded_ptr + group * N * R, block - blocks_a, N, rank, N, R, stride_bn,
            stride_br, BLOCK,
        )  # fmt: skip


@triton.jit
def _store_base(
    base_ptr, y_ptr, first_row, rows_left, first, end, N, stride_base_m, stride_base_n, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the columns from ``first`` to ``end`` of y for rows without a branch: the base, or zeros."""
    row = tl.arange(0, BLOCK_M)[:, None]
    y = tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty)
    for start in range(first, end, BLOCK_N):
        col = (start + tl.arange(0, BLOCK_N))[None, :]
        mask = (row < rows_left) & (col < N)
        if base_ptr is not None:
            base = tl.load(base_ptr + first_row * stride_base_m + row * stride_base_m + col * stride_base_n, mask=mask)
            y = base.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + first_row * stride_ym + row * stride_ym + col * stride_yn, y, mask=mask)


@triton.jit(do_not_specialize=[*OF_ROWS, *OF_GROUPS, "segment_tiles", "threshold", "seed_ptr"])
def ragged_xa_phi_hb_forward_kernel(
    x_ptr, a_ptr, b_ptr, base_ptr, y_ptr, z_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, seed_ptr, M, G, K, N, r,
    stride_xm, stride_ag, stride_ar, stride_ak, stride_bg, stride_bn, stride_br, stride_base_m, stride_base_n,
    stride_ym, stride_yn, stride_alpha, stride_scaling, scaling, inverse_keep, segment_tiles, threshold, calls_per_row,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F. Grid: (tiles of rows,). Rows without a branch get the base, or zeros, and a z of zeros."""
    group, rank, first_row, rows_left = find_tile(ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if rows_left <= 0:
        return
    if rank == 0:
        if z_ptr is not None:
            store_z(z_ptr, tl.zeros((BLOCK_M, R), x_ptr.dtype.element_ty), first_row, rows_left, r, BLOCK_M, R)
        if y_ptr is not None:
            _store_base(
                base_ptr, y_ptr, first_row, rows_left, 0, N, N, stride_base_m, stride_base_n, stride_ym, stride_yn,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        return
    seed = tl.load(seed_ptr) if DROPOUT else 0
    z = project(
        x_ptr, own(a_ptr, group, stride_ag), first_row, rows_left, 0, tl.cdiv(K, BLOCK_L), segment_tiles, K, rank,
        stride_xm, stride_ar, stride_ak, seed, threshold, calls_per_row,
        BLOCK_M, BLOCK_L, R, RANK_STEP, DROPOUT, PRECISION,
    )  # fmt: skip
    z = (z * inverse_keep).to(x_ptr.dtype.element_ty)
    if z_ptr is not None:
        store_z(z_ptr, z, first_row, rows_left, r, BLOCK_M, R)
    if y_ptr is not None:
        alpha_t = own_alpha(alpha_ptr, group, stride_alpha, ACT)
        scaling = own_scaling(scaling_ptr, group, stride_scaling, scaling)
        h = phi(z.to(tl.float32), alpha_t, ACT).to(x_ptr.dtype.element_ty)
        b_ptr = own(b_ptr, group, stride_bg)
        for start in range(0, N, BLOCK_N):
            store_y(
                h, b_ptr, base_ptr, y_ptr, first_row, rows_left, start, N, rank, stride_bn, stride_br,
                stride_base_m, stride_base_n, stride_ym, stride_yn, scaling,
                BLOCK_M, BLOCK_N, R, RANK_STEP, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*OF_ROWS, "segment_tiles", "threshold", "seed_ptr"])
def ragged_project_partial_kernel(
    left_ptr, small_ptr, partial_ptr, ends_ptr, ranks_ptr, seed_ptr, M, G, length, r, segment_tiles,
    stride_row, stride_group, stride_rank, stride_small, threshold, calls_per_row,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F1, and D1 of few rows. Grid: (tiles of rows, segments). Rows without a branch get no partial, and nothing reads
    it."""
    group, rank, first_row, rows_left = find_tile(ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if (rows_left <= 0) | (rank == 0):
        return
    segment = tl.program_id(1)
    first = segment * segment_tiles
    tiles = tl.minimum(segment_tiles, tl.cdiv(length, BLOCK_L) - first)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    partial = project(
        left_ptr, own(small_ptr, group, stride_group), first_row, rows_left, first, tiles, segment_tiles, length,
        rank, stride_row, stride_rank, stride_small, seed, threshold, calls_per_row,
        BLOCK_M, BLOCK_L, R, RANK_STEP, DROPOUT, PRECISION,
    )  # fmt: skip
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, R)
    target = partial_ptr + (segment.to(tl.int64) * M + first_row) * R + row[:, None] * R + column[None, :]
    tl.store(target, partial, mask=(row < rows_left)[:, None])


@triton.jit(do_not_specialize=[*OF_ROWS, *OF_GROUPS, "segments", "tiles"])
def ragged_phi_hb_forward_kernel(
    partial_ptr, b_ptr, base_ptr, y_ptr, z_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, M, G, N, r, segments,
    tiles, stride_bg, stride_bn, stride_br, stride_base_m, stride_base_n, stride_ym, stride_yn, stride_alpha,
    stride_scaling, scaling, inverse_keep,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F2. Grid: (tiles of rows, columns of programs), ``tiles`` tiles of y in each."""
    group, rank, first_row, rows_left = find_tile(ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if rows_left <= 0:
        return
    column = tl.program_id(1)
    z_rows = tl.where(column == 0, rows_left, 0)
    first = column * tiles * BLOCK_N
    end = tl.minimum(first + tiles * BLOCK_N, N)
    if rank == 0:
        if z_ptr is not None:
            store_z(z_ptr, tl.zeros((BLOCK_M, R), DTYPE), first_row, z_rows, r, BLOCK_M, R)
        if y_ptr is not None:
            _store_base(
                base_ptr, y_ptr, first_row, rows_left, first, end, N, stride_base_m, stride_base_n, stride_ym,
                stride_yn, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        return
    z = sum_partials(partial_ptr, first_row, rows_left, M, segments, BLOCK_M, R)
    z = (z * inverse_keep).to(DTYPE)
    if z_ptr is not None:
        store_z(z_ptr, z, first_row, z_rows, r, BLOCK_M, R)
    if y_ptr is not None:
        alpha_t = own_alpha(alpha_ptr, group, stride_alpha, ACT)
        scaling = own_scaling(scaling_ptr, group, stride_scaling, scaling)
        h = phi(z.to(tl.float32), alpha_t, ACT).to(DTYPE)
        b_ptr = own(b_ptr, group, stride_bg)
        for start in range(first, end, BLOCK_N):
            store_y(
                h, b_ptr, base_ptr, y_ptr, first_row, rows_left, start, N, rank, stride_bn, stride_br,
                stride_base_m, stride_base_n, stride_ym, stride_yn, scaling,
                BLOCK_M, BLOCK_N, R, RANK_STEP, PRECISION,
            )  # fmt: skip
