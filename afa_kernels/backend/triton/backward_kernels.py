"""The Triton kernels of the backward; forward_kernels.py says what holds for all of them."""

import triton
import triton.language as tl

from afa_kernels.backend.triton.device_functions import (
    keep_mask,
    load_alpha,
    load_small,
    load_z,
    multiple,
    phi,
    phi_slope,
    project,
    sum_partials,
)


@triton.jit
def store_dz(
    dh, z_ptr, dz_ptr, alpha_t, first_row, rows_left, r, factor,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row, rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    z = load_z(z_ptr, first_row, rows_left, r, BLOCK_M, R)
    dz = factor * dh * phi_slope(z, alpha_t, ACT)
    dz = dz.to(dz_ptr.dtype.element_ty)
    target = dz_ptr + first_row * R + row[:, None] * R + rank[None, :]
    tl.store(target, dz, mask=(row < rows_left)[:, None])


@triton.jit(do_not_specialize=["M", "segment_tiles", "alpha_ptr"])
def dyb_dphi_backward_kernel(
    dy_ptr, b_ptr, z_ptr, dz_ptr, alpha_ptr, M, N, r, stride_dym, stride_bn, stride_br, factor, segment_tiles,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D1: ``dz = factor * (dy b) * phi'(z)`` as (M, R) in one pass over dy. Grid: (M /
    BLOCK_M,)."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    dh = project(
        dy_ptr, b_ptr, first_row, rows_left, 0, tl.cdiv(N, BLOCK_L), segment_tiles, N, r, stride_dym, stride_br,
        stride_bn, 0, 0, 0, BLOCK_M, BLOCK_L, R, RANK_STEP, False, PRECISION,
    )  # fmt: skip
    alpha_t = load_alpha(alpha_ptr, ACT)
    store_dz(dh, z_ptr, dz_ptr, alpha_t, first_row, rows_left, r, factor, ACT, BLOCK_M, R)


@triton.jit(do_not_specialize=["M", "count", "alpha_ptr"])
def dphi_backward_kernel(
    partial_ptr, z_ptr, dz_ptr, alpha_ptr, M, r, count, factor,
    ACT: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """R, first job: ``dz = factor * sum(dh partials) * phi'(z)``. Grid: (M / BLOCK_M,)."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    dh = sum_partials(partial_ptr, first_row, rows_left, M, count, BLOCK_M, R)
    alpha_t = load_alpha(alpha_ptr, ACT)
    store_dz(dh, z_ptr, dz_ptr, alpha_t, first_row, rows_left, r, factor, ACT, BLOCK_M, R)


@triton.jit
def load_slab(
    small_ptr, slab, r, length, stride_rank, stride_col, dtype: tl.constexpr,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Return the (R, BLOCK_L) slab of a, or of b transposed, that stays on the chip while a pass goes over rows."""
    rank, col = tl.arange(0, R), slab * BLOCK_L + tl.arange(0, BLOCK_L)
    return load_small(
        small_ptr, rank[:, None], col[None, :], r, length, stride_rank, stride_col, dtype, R, RANK_STEP
    )  # fmt: skip


@triton.jit
def dy_tile(
    db, dy_ptr, b, z_ptr, dh_ptr, db_ptr, alpha_t, first_row, rows_left, slab, M, N, r, stride_dym,
    ACT: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Read one tile of dy: store its part of dh and return ``db + h^T dy``, each if wanted.

    Both products have dy as their right operand, transposed or not: with dy on the left, or under a transpose of its
    own, the compiler for sm_80 no longer stages it asynchronously, and spills.
    """
    row, rank, col = tl.arange(0, BLOCK_M), tl.arange(0, R), slab * BLOCK_L + tl.arange(0, BLOCK_L)
    dy = tl.load(
        dy_ptr + first_row * stride_dym + row[:, None] * stride_dym + col[None, :],
        mask=(row < rows_left)[:, None] & (col < N)[None, :], other=0.0,
    )  # fmt: skip
    if db_ptr is not None:
        z = load_z(z_ptr, first_row, rows_left, r, BLOCK_M, R)
        h = phi(z, alpha_t, ACT).to(dy_ptr.dtype.element_ty)
        db = tl.dot(tl.trans(h), dy, db, input_precision=PRECISION)
    if dh_ptr is not None:
        dh = tl.dot(b, tl.trans(dy), tl.zeros((R, BLOCK_M), tl.float32), input_precision=PRECISION)
        target = dh_ptr + (slab.to(tl.int64) * M + first_row) * R + row[None, :] * R + rank[:, None]
        tl.store(target, dh, mask=(row < rows_left)[None, :])
    return db


@triton.jit(do_not_specialize=["M", "rows_per_chunk", "alpha_ptr"])
def dy_pass_backward_kernel(
    dy_ptr, b_ptr, z_ptr, dh_ptr, db_ptr, alpha_ptr, M, N, r, rows_per_chunk,
    stride_dym, stride_bn, stride_br,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D: in one pass over dy, ``dh = dy b`` as partials (slabs, M, R) and ``db^T = h^T dy`` as
    partials (chunks, R, N).

    ``db_ptr`` None: dh alone; ``dh_ptr`` None: db alone (D2). Grid: (N / BLOCK_L slabs, chunks of
    rows). The slab of b stays on the chip.
    """
    slab, chunk = tl.program_id(0), tl.program_id(1)
    rank, col = tl.arange(0, R), slab * BLOCK_L + tl.arange(0, BLOCK_L)
    alpha_t = load_alpha(alpha_ptr, ACT)
    db = tl.zeros((R, BLOCK_L), tl.float32)
    if dh_ptr is not None:
        b = load_slab(
            b_ptr, slab, r, N, stride_br, multiple(stride_bn, RANK_STEP), dy_ptr.dtype.element_ty,
            R, RANK_STEP, BLOCK_L,
        )  # fmt: skip
    else:
        b = None
    first = chunk.to(tl.int64) * rows_per_chunk
    for start in range(0, tl.minimum(rows_per_chunk, M - first).to(tl.int32), BLOCK_M):
        first_row = first + start
        rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
        db = dy_tile(
            db, dy_ptr, b, z_ptr, dh_ptr, db_ptr, alpha_t, first_row, rows_left, slab, M, N, r, stride_dym,
            ACT, R, BLOCK_M, BLOCK_L, PRECISION,
        )  # fmt: skip
    if db_ptr is not None:
        tl.store(db_ptr + (chunk * R + rank[:, None]).to(tl.int64) * N + col[None, :], db, mask=(col < N)[None, :])


@triton.jit
def x_tile(
    da, dz_ptr, a, x_ptr, dx_ptr, da_ptr, first_row, rows_left, slab, K, stride_xm, seed, threshold, calls_per_row,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, ADDS_DX: tl.constexpr = False,
):  # fmt: skip
    """Store a tile ``drop(dz a)`` of dx, or add it to the one that is there, read the one of x, and return
    ``da + dz^T drop(x)``, each if wanted, under one mask."""
    row, rank, col = tl.arange(0, BLOCK_M), tl.arange(0, R), slab * BLOCK_L + tl.arange(0, BLOCK_L)
    row_mask = (row < rows_left)[:, None]
    mask = row_mask & (col < K)[None, :]
    dz = tl.load(dz_ptr + first_row * R + row[:, None] * R + rank[None, :], mask=row_mask, other=0.0)
    if ADDS_DX:  # on its way while the products of da are made
        old_dx = tl.load(dx_ptr + first_row * K + row[:, None] * K + col[None, :], mask=mask, other=0.0)
    if DROPOUT:
        keep = keep_mask(seed, threshold, first_row, slab * BLOCK_L, calls_per_row, BLOCK_M, BLOCK_L)
    if da_ptr is not None:
        x = tl.load(
            x_ptr + first_row * stride_xm + row[:, None] * stride_xm + col[None, :], mask=mask, other=0.0
        )  # fmt: skip
        if DROPOUT:
            x = tl.where(keep, x, 0.0).to(x.dtype)
        da = tl.dot(tl.trans(dz), x, da, input_precision=PRECISION)
    if dx_ptr is not None:
        dx = tl.dot(dz, a, tl.zeros((BLOCK_M, BLOCK_L), tl.float32), input_precision=PRECISION)
        if DROPOUT:
            dx = tl.where(keep, dx, 0.0)
        if ADDS_DX:
            dx += old_dx.to(tl.float32)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + first_row * K + row[:, None] * K + col[None, :], dx, mask=mask)
    return da


@triton.jit(do_not_specialize=["M", "rows_per_chunk", "threshold", "seed_ptr"])
def x_pass_backward_kernel(
    dz_ptr, a_ptr, x_ptr, dx_ptr, da_ptr, seed_ptr, M, K, r, rows_per_chunk,
    stride_ar, stride_ak, stride_xm, threshold, calls_per_row,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X: ``dx = drop(dz a)``, written, and ``da = dz^T drop(x)`` as partials (chunks, R, K).

    ``dx_ptr`` or ``da_ptr`` None: not wanted. dx is contiguous. Grid: (K / BLOCK_L slabs, chunks of
    rows).
    """
    slab, chunk = tl.program_id(0), tl.program_id(1)
    rank, col = tl.arange(0, R), slab * BLOCK_L + tl.arange(0, BLOCK_L)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    da = tl.zeros((R, BLOCK_L), tl.float32)
    if dx_ptr is not None:
        a = load_slab(
            a_ptr, slab, r, K, stride_ar, stride_ak, dz_ptr.dtype.element_ty, R, RANK_STEP, BLOCK_L
        )  # fmt: skip
    else:
        a = None
    first = chunk.to(tl.int64) * rows_per_chunk
    for start in range(0, tl.minimum(rows_per_chunk, M - first).to(tl.int32), BLOCK_M):
        first_row = first + start
        rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
        da = x_tile(
            da, dz_ptr, a, x_ptr, dx_ptr, da_ptr, first_row, rows_left, slab, K, stride_xm, seed, threshold,
            calls_per_row, R, BLOCK_M, BLOCK_L, DROPOUT, PRECISION,
        )  # fmt: skip
    if da_ptr is not None:
        tl.store(da_ptr + (chunk * R + rank[:, None]).to(tl.int64) * K + col[None, :], da, mask=(col < K)[None, :])


@triton.jit
def sum_chunks(
    partial_ptr,
    rank,
    col,
    length,
    chunks,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((RANKS, BLOCK), tl.float32)
    for chunk in range(chunks):
        rows = (chunk * R + rank[:, None]).to(tl.int64)
        total += tl.load(partial_ptr + rows * length + col[None, :], mask=(col < length)[None, :], other=0.0)
    return total


@triton.jit(do_not_specialize=["chunks_a", "chunks_b", "blocks_a"])
def weight_gradients_kernel(
    da_partial_ptr, db_partial_ptr, da_ptr, db_ptr, K, N, r, chunks_a, chunks_b, blocks_a, scaling,
    R: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R, second job: ``da (r, K)`` and ``db (N, r) = scaling * sum``, rounded once, to their own
    dtypes.

    Grid: (``blocks_a`` blocks of K, then blocks of N; R / RANKS). ``da_ptr`` or ``db_ptr`` None: no
    blocks of it.
    """
    block = tl.program_id(0)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    rank_mask = (rank < r)[:, None]
    if da_ptr is not None:
        if block < blocks_a:
            col = block * BLOCK + tl.arange(0, BLOCK)
            da = sum_chunks(da_partial_ptr, rank, col, K, chunks_a, R, RANKS, BLOCK)
            da = da.to(da_ptr.dtype.element_ty)
            tl.store(da_ptr + rank[:, None] * K + col[None, :], da, mask=rank_mask & (col < K)[None, :])
    if db_ptr is not None:
        if block >= blocks_a:
            col = (block - blocks_a) * BLOCK + tl.arange(0, BLOCK)
            db = scaling * sum_chunks(db_partial_ptr, rank, col, N, chunks_b, R, RANKS, BLOCK)
            db = db.to(db_ptr.dtype.element_ty)
            tl.store(db_ptr + col[None, :] * r + rank[:, None], db, mask=rank_mask & (col < N)[None, :])
