"""The Triton kernels of the forward, and what holds for those of the backward too.

x and dy have their columns side by side. M tokens, K inputs, N outputs, R the rank r padded to a
power of two. ``a`` is (r, K) and ``b`` is (N, r), of any strides and floating dtype: where they are
read they are rounded to the dtype of x and padded with zeros (``load_small``), or, above rank
configs.UNPACKED_RANK, before all by ``pack_kernel``. z is (M, r), without padding. Row offsets are
int64, offsets inside a tile int32 (launch.py makes sure that they fit). alpha_t and seed are
read from the device, M is not specialised: neither a new alpha_t nor a new M compiles anything.
Every sum has a fixed order: partial results go to their own place in float32 and are added by
index, never atomically.
"""

import triton
import triton.language as tl

from afa_kernels.backend.triton.device_functions import (
    load_alpha,
    load_small,
    multiple,
    phi,
    project,
    sum_partials,
)


@triton.jit
def copy_padded(
    source_ptr, target_ptr, block, rows, cols, target_rows, target_cols, stride_row, stride_col,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = block * BLOCK + tl.arange(0, BLOCK)
    row, col = index // target_cols, index % target_cols
    value = tl.load(
        source_ptr + row * stride_row + col * stride_col, mask=(row < rows) & (col < cols),
        other=0.0
    ).to(tl.float32)  # fmt: skip
    value = value.to(target_ptr.dtype.element_ty)
    tl.store(target_ptr + index, value, mask=row < target_rows)


@triton.jit
def pack_kernel(
    a_ptr, b_ptr, a_padded_ptr, b_padded_ptr, blocks_a, K, N, r,
    stride_ar, stride_ak, stride_bn, stride_br,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round a to (R, K) and b to (N, R), with zeros beyond rank r. Grid: blocks of a, then
    blocks of b."""
    block = tl.program_id(0)
    if block < blocks_a:
        copy_padded(a_ptr, a_padded_ptr, block, r, K, R, K, stride_ar, stride_ak, BLOCK)
    else:
        copy_padded(
            b_ptr,
            b_padded_ptr,
            block - blocks_a,
            N,
            r,
            N,
            R,
            stride_bn,
            stride_br,
            BLOCK,
        )


@triton.jit
def store_z(z_ptr, z, first_row, rows_left, r, BLOCK_M: tl.constexpr, R: tl.constexpr):
    row, rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    mask = (row < rows_left)[:, None] & (rank < r)[None, :]
    tl.store(z_ptr + first_row * r + row[:, None] * r + rank[None, :], z, mask=mask)


@triton.jit
def store_y(
    h, b_ptr, base_ptr, y_ptr, first_row, rows_left, start, N, r, stride_bn, stride_br, stride_base_m,
    stride_base_n, stride_ym, stride_yn, scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, rank, col = tl.arange(0, BLOCK_M), tl.arange(0, R), start + tl.arange(0, BLOCK_N)
    b = load_small(
        b_ptr, rank[:, None], col[None, :], r, N, stride_br, multiple(stride_bn, RANK_STEP), h.dtype, R, RANK_STEP,
    )  # fmt: skip
    y = scaling * tl.dot(h, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), input_precision=PRECISION)
    mask = (row < rows_left)[:, None] & (col < N)[None, :]
    if base_ptr is not None:
        base = tl.load(
            base_ptr + first_row * stride_base_m + row[:, None] * stride_base_m + col[None,
            :] * stride_base_n,
            mask=mask, other=0.0,
        )  # fmt: skip
        y += base.to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(
        y_ptr + first_row * stride_ym + row[:, None] * stride_ym + col[None, :] * stride_yn,
        y,
        mask=mask,
    )


@triton.jit(do_not_specialize=["M", "segment_tiles", "threshold", "alpha_ptr", "seed_ptr"])
def xa_phi_hb_forward_kernel(
    x_ptr, a_ptr, b_ptr, base_ptr, y_ptr, z_ptr, alpha_ptr, seed_ptr, M, K, N, r,
    stride_xm, stride_ar, stride_ak, stride_bn, stride_br, stride_base_m, stride_base_n, stride_ym,
    stride_yn, scaling, inverse_keep, segment_tiles, threshold, calls_per_row,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F: ``y = base + scaling * phi(x a^T) b^T`` and ``z = x a^T`` in one pass over x. Grid: (M /
    BLOCK_M,).

    1. accumulate z over K   2. round and store z, h = phi(z) in registers   3. loop over N for y.
    ``z_ptr`` None: z is not stored. ``y_ptr`` None: z is all that is wanted.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    z = project(
        x_ptr, a_ptr, first_row, rows_left, 0, tl.cdiv(K, BLOCK_L), segment_tiles, K, r, stride_xm, stride_ar,
        stride_ak, seed, threshold, calls_per_row, BLOCK_M, BLOCK_L, R, RANK_STEP, DROPOUT, PRECISION,
    )  # fmt: skip
    # The backward recomputes h from the stored z, so it is rounded first: otherwise y and dB would
    # use two different h.
    z = (z * inverse_keep).to(x_ptr.dtype.element_ty)
    if z_ptr is not None:
        store_z(z_ptr, z, first_row, rows_left, r, BLOCK_M, R)
    if y_ptr is not None:
        alpha_t = load_alpha(alpha_ptr, ACT)
        h = phi(z.to(tl.float32), alpha_t, ACT).to(x_ptr.dtype.element_ty)
        for start in range(0, N, BLOCK_N):
            store_y(
                h, b_ptr, base_ptr, y_ptr, first_row, rows_left, start, N, r, stride_bn, stride_br,
                stride_base_m, stride_base_n, stride_ym, stride_yn, scaling,
                BLOCK_M, BLOCK_N, R, RANK_STEP, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "segment_tiles", "threshold", "seed_ptr"])
def project_partial_kernel(
    left_ptr, small_ptr, partial_ptr, seed_ptr, M, length, r, segment_tiles,
    stride_row, stride_rank, stride_small, threshold, calls_per_row,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F1, and D1 of few rows: one segment of the sum ``left small^T`` as a float32 partial (segments, M, R). Grid: (M /
    BLOCK_M, segments)."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    segment = tl.program_id(1)
    rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    first = segment * segment_tiles
    tiles = tl.minimum(segment_tiles, tl.cdiv(length, BLOCK_L) - first)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    partial = project(
        left_ptr, small_ptr, first_row, rows_left, first, tiles, segment_tiles, length, r, stride_row, stride_rank,
        stride_small, seed, threshold, calls_per_row, BLOCK_M, BLOCK_L, R, RANK_STEP, DROPOUT, PRECISION,
    )  # fmt: skip
    row, rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    target = partial_ptr + (segment.to(tl.int64) * M + first_row) * R + row[:, None] * R + rank[None, :]
    tl.store(target, partial, mask=(row < rows_left)[:, None])


@triton.jit(do_not_specialize=["M", "segments", "tiles", "alpha_ptr"])
def phi_hb_forward_kernel(
    partial_ptr, b_ptr, base_ptr, y_ptr, z_ptr, alpha_ptr, M, N, r, segments, tiles,
    stride_bn, stride_br, stride_base_m, stride_base_n, stride_ym, stride_yn, scaling, inverse_keep,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F2: z from its partials, stored by the first column of programs, then y.

    Grid: (M / BLOCK_M, columns of programs), ``tiles`` tiles of y in each.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    column = tl.program_id(1)
    rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    z = sum_partials(partial_ptr, first_row, rows_left, M, segments, BLOCK_M, R)
    z = (z * inverse_keep).to(DTYPE)
    if z_ptr is not None:
        z_rows = tl.where(column == 0, rows_left, 0)
        store_z(z_ptr, z, first_row, z_rows, r, BLOCK_M, R)
    if y_ptr is not None:
        alpha_t = load_alpha(alpha_ptr, ACT)
        h = phi(z.to(tl.float32), alpha_t, ACT).to(DTYPE)
        first = column * tiles * BLOCK_N
        for start in range(first, tl.minimum(first + tiles * BLOCK_N, N), BLOCK_N):
            store_y(
                h, b_ptr, base_ptr, y_ptr, first_row, rows_left, start, N, r, stride_bn, stride_br,
                stride_base_m, stride_base_n, stride_ym, stride_yn, scaling,
                BLOCK_M, BLOCK_N, R, RANK_STEP, PRECISION,
            )  # fmt: skip
