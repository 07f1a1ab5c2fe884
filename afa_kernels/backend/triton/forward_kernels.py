"""The Triton kernels of the forward, and what holds for those of the backward too.

x and dy have their columns side by side. M tokens, K inputs, N outputs, R the rank r padded to a
power of two. ``a`` is (r, K) and ``b`` is (N, r), of any strides and floating dtype: where they are
read they are rounded to the dtype of x and padded with zeros (``load_small``), or, above rank
configs.UNPACKED_RANK, before all by ``pack_kernel``. z is (M, r), without padding. Row offsets are
int64, offsets inside a tile int32 (launch.py makes sure that they fit). alpha_t and seed are read
from the device.

By owner, ``a`` is (G, r, K), ``b`` is (G, N, r), and a program finds the owner of its rows
(device_functions.py). Its rows have the bits of a call with that owner alone. "Tiles of rows" in a
grid are M / BLOCK_M programs, or by owner M / BLOCK_M + G + 1, of which some have no rows.

Every sum has a fixed order: partial results go to their own place in float32 and are added by
index, never atomically.
"""

import triton
import triton.language as tl

from afa_kernels.backend.triton.device_functions import (
    UNSPECIALIZED,
    find_tile,
    load_alpha,
    load_small,
    multiple,
    own,
    own_scaling,
    phi,
    project,
    rows_of,
    sum_partials,
)


@triton.jit
def copy_padded(
    source_ptr, target_ptr, block, rows, cols, target_rows, target_cols, stride_row, stride_col, BLOCK: tl.constexpr
):  # fmt: skip
    index = block * BLOCK + tl.arange(0, BLOCK)
    row, col = index // target_cols, index % target_cols
    value = tl.load(
        source_ptr + row * stride_row + col * stride_col, mask=(row < rows) & (col < cols), other=0.0
    ).to(tl.float32)  # fmt: skip
    tl.store(target_ptr + index, value.to(target_ptr.dtype.element_ty), mask=row < target_rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pack_kernel(
    a_ptr, b_ptr, a_padded_ptr, b_padded_ptr, ends_ptr, ranks_ptr, blocks_a, M, G, K, N, r,
    stride_ag, stride_ar, stride_ak, stride_bg, stride_bn, stride_br,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round a to (R, K) and b to (N, R), with zeros beyond rank r; those of owners that have rows. Grid: (blocks of a,
    then blocks of b; owners)."""
    block = tl.program_id(0)
    rank = r
    if ends_ptr is not None:
        owner = tl.program_id(1)
        first, end, rank = rows_of(owner, ends_ptr, ranks_ptr, M, G, r)
        if (end <= first) | (rank == 0):
            return
        a_ptr, b_ptr = own(a_ptr, owner, stride_ag), own(b_ptr, owner, stride_bg)
        a_padded_ptr, b_padded_ptr = own(a_padded_ptr, owner, K * R), own(b_padded_ptr, owner, N * R)
    if block < blocks_a:
        copy_padded(a_ptr, a_padded_ptr, block, rank, K, R, K, stride_ar, stride_ak, BLOCK)
    else:
        copy_padded(b_ptr, b_padded_ptr, block - blocks_a, N, rank, N, R, stride_bn, stride_br, BLOCK)


@triton.jit
def store_z(z_ptr, z, first_row, rows_left, r, BLOCK_M: tl.constexpr, R: tl.constexpr):
    row, rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    mask = (row < rows_left)[:, None] & (rank < r)[None, :]
    tl.store(z_ptr + first_row * r + row[:, None] * r + rank[None, :], z, mask=mask)


@triton.jit
def store_without_branch(
    base_ptr, y_ptr, z_ptr, first_row, rows_left, z_rows, first, end, N, r, stride_base_m, stride_base_n, stride_ym,
    stride_yn, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Store what rows of rank 0 have: a z of zeros, and in y's columns from ``first`` to ``end`` the base, or zeros."""
    if z_ptr is not None:
        store_z(z_ptr, tl.zeros((BLOCK_M, R), DTYPE), first_row, z_rows, r, BLOCK_M, R)
    if y_ptr is not None:
        row = tl.arange(0, BLOCK_M)[:, None]
        y = tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty)
        for start in range(first, end, BLOCK_N):
            col = (start + tl.arange(0, BLOCK_N))[None, :]
            mask = (row < rows_left) & (col < N)
            if base_ptr is not None:
                base_rows = base_ptr + first_row * stride_base_m + row * stride_base_m
                y = tl.load(base_rows + col * stride_base_n, mask=mask).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + first_row * stride_ym + row * stride_ym + col * stride_yn, y, mask=mask)


@triton.jit
def store_branch(
    z, b_ptr, base_ptr, y_ptr, z_ptr, alpha_ptr, scaling_ptr, owner, rank, first_row, rows_left, z_rows, first, end,
    N, r, stride_bg, stride_bn, stride_br, stride_base_m, stride_base_n, stride_ym, stride_yn, stride_alpha,
    stride_scaling, scaling, inverse_keep, DTYPE: tl.constexpr, ACT: tl.constexpr, R: tl.constexpr,
    RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store, each if wanted, ``z_rows`` rows of z, and y's columns from ``first`` to ``end``, of a tile whose sum over
    K is ``z``."""
    # The backward recomputes h from the stored z, so it is rounded first: otherwise y and dB would
    # use two different h.
    z = (z * inverse_keep).to(DTYPE)
    if z_ptr is not None:
        store_z(z_ptr, z, first_row, z_rows, r, BLOCK_M, R)
    if y_ptr is not None:
        alpha_t = load_alpha(alpha_ptr, owner, stride_alpha, ACT)
        scaling = own_scaling(scaling_ptr, owner, stride_scaling, scaling)
        h = phi(z.to(tl.float32), alpha_t, ACT).to(DTYPE)
        b_ptr = own(b_ptr, owner, stride_bg)
        for start in range(first, end, BLOCK_N):
            row, rank_row, col = tl.arange(0, BLOCK_M), tl.arange(0, R), start + tl.arange(0, BLOCK_N)
            b = load_small(
                b_ptr, rank_row[:, None], col[None, :], rank, N, stride_br, multiple(stride_bn, RANK_STEP), DTYPE, R,
                RANK_STEP,
            )  # fmt: skip
            y = scaling * tl.dot(h, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), input_precision=PRECISION)
            mask = (row < rows_left)[:, None] & (col < N)[None, :]
            if base_ptr is not None:
                base_rows = base_ptr + first_row * stride_base_m + row[:, None] * stride_base_m
                y += tl.load(base_rows + col[None, :] * stride_base_n, mask=mask, other=0.0).to(tl.float32)
            y = y.to(y_ptr.dtype.element_ty)
            y_rows = y_ptr + first_row * stride_ym + row[:, None] * stride_ym
            tl.store(y_rows + col[None, :] * stride_yn, y, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def xa_phi_hb_forward_kernel(
    x_ptr, a_ptr, b_ptr, base_ptr, y_ptr, z_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, seed_ptr, M, G, K, N, r,
    stride_xm, stride_ag, stride_ar, stride_ak, stride_bg, stride_bn, stride_br, stride_base_m, stride_base_n,
    stride_ym, stride_yn, stride_alpha, stride_scaling, scaling, inverse_keep, segment_tiles, threshold, calls_per_row,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F: ``y = base + scaling * phi(x a^T) b^T`` and ``z = x a^T`` in one pass over x. Grid: (tiles of rows,).

    1. accumulate z over K   2. round and store z, h = phi(z) in registers   3. loop over N for y.
    ``z_ptr`` or ``y_ptr`` None: not wanted.
    """
    owner, rank, first_row, rows_left = find_tile(tl.program_id(0), ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if ends_ptr is not None:
        if rows_left <= 0:
            return
        if rank == 0:
            store_without_branch(
                base_ptr, y_ptr, z_ptr, first_row, rows_left, rows_left, 0, N, N, r, stride_base_m, stride_base_n,
                stride_ym, stride_yn, x_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, R,
            )  # fmt: skip
            return
    seed = tl.load(seed_ptr) if DROPOUT else 0
    z = project(
        x_ptr, own(a_ptr, owner, stride_ag), first_row, rows_left, 0, tl.cdiv(K, BLOCK_L), segment_tiles, K, rank,
        stride_xm, stride_ar, stride_ak, seed, threshold, calls_per_row,
        BLOCK_M, BLOCK_L, R, RANK_STEP, DROPOUT, PRECISION,
    )  # fmt: skip
    z = tl.where((tl.arange(0, R) < rank)[None, :], z, 0.0)  # an infinity in x times the zeros beyond the rank is NaN
    store_branch(
        z, b_ptr, base_ptr, y_ptr, z_ptr, alpha_ptr, scaling_ptr, owner, rank, first_row, rows_left, rows_left, 0, N,
        N, r, stride_bg, stride_bn, stride_br, stride_base_m, stride_base_n, stride_ym, stride_yn, stride_alpha,
        stride_scaling, scaling, inverse_keep, x_ptr.dtype.element_ty, ACT, R, RANK_STEP, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def project_partial_kernel(
    left_ptr, small_ptr, partial_ptr, ends_ptr, ranks_ptr, seed_ptr, M, G, length, r, segment_tiles,
    stride_row, stride_owner, stride_rank, stride_small, threshold, calls_per_row,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F1, and D1 of few rows: one segment of the sum ``left small^T`` as a float32 partial (segments, M, R). Grid:
    (tiles of rows, segments). Rows without a branch get no partial, and nothing reads it."""
    tile, segment = tl.program_id(0), tl.program_id(1)
    owner, rank, first_row, rows_left = find_tile(tile, ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if ends_ptr is not None:
        if (rows_left <= 0) | (rank == 0):
            return
    first = segment * segment_tiles
    tiles = tl.minimum(segment_tiles, tl.cdiv(length, BLOCK_L) - first)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    partial = project(
        left_ptr, own(small_ptr, owner, stride_owner), first_row, rows_left, first, tiles, segment_tiles, length,
        rank, stride_row, stride_rank, stride_small, seed, threshold, calls_per_row,
        BLOCK_M, BLOCK_L, R, RANK_STEP, DROPOUT, PRECISION,
    )  # fmt: skip
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, R)
    target = partial_ptr + (segment.to(tl.int64) * M + first_row) * R + row[:, None] * R + column[None, :]
    tl.store(target, partial, mask=(row < rows_left)[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def phi_hb_forward_kernel(
    partial_ptr, b_ptr, base_ptr, y_ptr, z_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, M, G, N, r, segments,
    tiles, stride_bg, stride_bn, stride_br, stride_base_m, stride_base_n, stride_ym, stride_yn, stride_alpha,
    stride_scaling, scaling, inverse_keep,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F2: z from its partials, stored by the first column of programs, then y.

    Grid: (tiles of rows, columns of programs), ``tiles`` tiles of y in each.
    """
    tile, column = tl.program_id(0), tl.program_id(1)
    owner, rank, first_row, rows_left = find_tile(tile, ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    z_rows = tl.where(column == 0, rows_left, 0)
    first = column * tiles * BLOCK_N
    end = tl.minimum(first + tiles * BLOCK_N, N)
    if ends_ptr is not None:
        if rows_left <= 0:
            return
        if rank == 0:
            store_without_branch(
                base_ptr, y_ptr, z_ptr, first_row, rows_left, z_rows, first, end, N, r, stride_base_m, stride_base_n,
                stride_ym, stride_yn, DTYPE, BLOCK_M, BLOCK_N, R,
            )  # fmt: skip
            return
    z = sum_partials(partial_ptr, first_row, rows_left, M, rank, segments, BLOCK_M, R)
    store_branch(
        z, b_ptr, base_ptr, y_ptr, z_ptr, alpha_ptr, scaling_ptr, owner, rank, first_row, rows_left, z_rows, first, end,
        N, r, stride_bg, stride_bn, stride_br, stride_base_m, stride_base_n, stride_ym, stride_yn, stride_alpha,
        stride_scaling, scaling, inverse_keep, DTYPE, ACT, R, RANK_STEP, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
