"""The Triton kernels of the backward; forward_kernels.py says what holds for all of them.

Rows without a branch get no dz, and nothing reads it.
"""

import triton
import triton.language as tl

from afa_kernels.backend.triton.device_functions import (
    UNSPECIALIZED,
    find_chunks,
    find_tile,
    keep_mask,
    load_alpha,
    load_small,
    load_z,
    multiple,
    own,
    own_factor,
    own_scaling,
    parts_with_rows,
    phi,
    phi_slope,
    project,
    rows_left_in,
    rows_of,
    sum_partials,
)


@triton.jit
def store_dz(
    dh, z_ptr, dz_ptr, alpha_t, first_row, rows_left, r, factor,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row, rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    z = load_z(z_ptr, first_row, rows_left, r, BLOCK_M, R)
    dz = (factor * dh * phi_slope(z, alpha_t, ACT)).to(dz_ptr.dtype.element_ty)
    target = dz_ptr + first_row * R + row[:, None] * R + rank[None, :]
    tl.store(target, dz, mask=(row < rows_left)[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dyb_dphi_backward_kernel(
    dy_ptr, b_ptr, z_ptr, dz_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, M, G, N, r,
    stride_dym, stride_bg, stride_bn, stride_br, stride_alpha, stride_scaling, factor, threshold, segment_tiles,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D1: ``dz = factor * (dy b) * phi'(z)`` as (M, R) in one pass over dy. Grid: (tiles of rows,)."""
    owner, rank, first_row, rows_left = find_tile(tl.program_id(0), ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if ends_ptr is not None:
        if (rows_left <= 0) | (rank == 0):
            return
    alpha_t = load_alpha(alpha_ptr, owner, stride_alpha, ACT)
    factor = own_factor(scaling_ptr, owner, stride_scaling, factor, threshold)
    dh = project(
        dy_ptr, own(b_ptr, owner, stride_bg), first_row, rows_left, 0, tl.cdiv(N, BLOCK_L), segment_tiles, N, rank,
        stride_dym, stride_br, stride_bn, 0, 0, 0, BLOCK_M, BLOCK_L, R, RANK_STEP, False, PRECISION,
    )  # fmt: skip
    dh = tl.where((tl.arange(0, R) < rank)[None, :], dh, 0.0)  # an infinity in dy times the zeros beyond is NaN
    store_dz(dh, z_ptr, dz_ptr, alpha_t, first_row, rows_left, r, factor, ACT, BLOCK_M, R)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dphi_backward_kernel(
    partial_ptr, z_ptr, dz_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, M, G, r, count,
    stride_alpha, stride_scaling, factor, threshold,
    ACT: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """R, first job: ``dz = factor * sum(dh partials) * phi'(z)``. Grid: (tiles of rows,)."""
    owner, rank, first_row, rows_left = find_tile(tl.program_id(0), ends_ptr, ranks_ptr, M, G, r, BLOCK_M)
    if ends_ptr is not None:
        if (rows_left <= 0) | (rank == 0):
            return
    dh = sum_partials(partial_ptr, first_row, rows_left, M, rank, count, BLOCK_M, R)
    alpha_t = load_alpha(alpha_ptr, owner, stride_alpha, ACT)
    factor = own_factor(scaling_ptr, owner, stride_scaling, factor, threshold)
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
def store_partial(partial_ptr, sums, slab, length, R: tl.constexpr, BLOCK_L: tl.constexpr):
    rank, col = tl.arange(0, R), slab * BLOCK_L + tl.arange(0, BLOCK_L)
    rows = (tl.program_id(1) * R + rank[:, None]).to(tl.int64)
    tl.store(partial_ptr + rows * length + col[None, :], sums, mask=(col < length)[None, :])


@triton.jit
def dy_tile(
    db, dy_ptr, b, z_ptr, dh_ptr, db_ptr, alpha_t, first_row, rows_left, slab, M, N, r, stride_dym,
    ACT: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, PRECISION: tl.constexpr,
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dy_pass_backward_kernel(
    dy_ptr, b_ptr, z_ptr, dh_ptr, db_ptr, ends_ptr, ranks_ptr, alpha_ptr, M, G, N, r,
    rows_per_chunk, parts, chunks, chunks_per_part, stride_dym, stride_bg, stride_bn, stride_br, stride_alpha,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D: in one pass over dy, ``dh = dy b`` as partials (slabs, M, R) and ``db^T = h^T dy`` as
    partials (chunks, R, N), by owner (G, parts, R, N).

    ``db_ptr`` None: dh alone; ``dh_ptr`` None: db alone (D2). Grid: (N / BLOCK_L slabs, chunks of
    rows or parts of owners). The slab of b stays on the chip.

    A part is a chunk of an owner's rows, or all of its chunks in order, one sum after the other: then the partial of
    the only part is the owner's whole sum, bit for bit what the reduction makes of the chunks.
    """
    slab = tl.program_id(0)
    owner, rank, first, rows, tiles_per_chunk = find_chunks(
        ends_ptr, ranks_ptr, M, G, r, rows_per_chunk, parts, chunks, chunks_per_part, BLOCK_M
    )  # fmt: skip
    if ends_ptr is not None:
        if (rows <= 0) | (rank == 0):
            return
        earlier_chunks, left_in_chunk = tl.zeros((R, BLOCK_L), tl.float32), tiles_per_chunk
    alpha_t = load_alpha(alpha_ptr, owner, stride_alpha, ACT)
    db = tl.zeros((R, BLOCK_L), tl.float32)
    if dh_ptr is not None:
        b = load_slab(
            own(b_ptr, owner, stride_bg), slab, rank, N, stride_br, multiple(stride_bn, RANK_STEP),
            dy_ptr.dtype.element_ty, R, RANK_STEP, BLOCK_L,
        )  # fmt: skip
    else:
        b = None
    for start in range(0, rows, BLOCK_M):
        first_row = first + start
        rows_left = rows_left_in(ends_ptr, M, first_row, rows, start, BLOCK_M)
        db = dy_tile(
            db, dy_ptr, b, z_ptr, dh_ptr, db_ptr, alpha_t, first_row, rows_left, slab, M, N, r, stride_dym,
            ACT, R, BLOCK_M, BLOCK_L, PRECISION,
        )  # fmt: skip
        if ends_ptr is not None:
            left_in_chunk -= 1
            if left_in_chunk == 0:
                earlier_chunks += db
                db = tl.zeros((R, BLOCK_L), tl.float32)
                left_in_chunk = tiles_per_chunk
    if db_ptr is not None:
        if ends_ptr is not None:
            db += earlier_chunks
        store_partial(db_ptr, db, slab, N, R, BLOCK_L)


@triton.jit
def x_tile(
    da, dz_ptr, a, x_ptr, dx_ptr, da_ptr, first_row, rows_left, slab, K, stride_xm, seed, threshold, calls_per_row,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, DROPOUT: tl.constexpr, ADDS_DX: tl.constexpr,
    PRECISION: tl.constexpr,
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
        x = tl.load(x_ptr + first_row * stride_xm + row[:, None] * stride_xm + col[None, :], mask=mask, other=0.0)
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


@triton.jit
def store_zeros(dx_ptr, first, rows, slab, K, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    row, col = tl.arange(0, BLOCK_M)[:, None], (slab * BLOCK_L + tl.arange(0, BLOCK_L))[None, :]
    zeros = tl.zeros((BLOCK_M, BLOCK_L), dx_ptr.dtype.element_ty)
    for start in range(0, rows, BLOCK_M):
        tl.store(dx_ptr + (first + start) * K + row * K + col, zeros, mask=(row < rows - start) & (col < K))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def x_pass_backward_kernel(
    dz_ptr, a_ptr, x_ptr, dx_ptr, da_ptr, ends_ptr, ranks_ptr, seed_ptr, M, G, K, r,
    rows_per_chunk, parts, chunks, chunks_per_part, stride_ag, stride_ar, stride_ak, stride_xm, threshold,
    calls_per_row,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    DROPOUT: tl.constexpr, ADDS_DX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X: ``dx = drop(dz a)``, written, and ``da = dz^T drop(x)`` as partials (chunks, R, K), by owner (G, parts, R, K),
    in parts as D has them.

    ``dx_ptr`` or ``da_ptr`` None: not wanted. dx is contiguous. With ADDS_DX it is added to, and rows without a branch
    keep what they hold. Grid: (K / BLOCK_L slabs, chunks of rows, or parts of owners and of the rows behind them).
    """
    slab = tl.program_id(0)
    owner, rank, first, rows, tiles_per_chunk = find_chunks(
        ends_ptr, ranks_ptr, M, G, r, rows_per_chunk, parts, chunks, chunks_per_part, BLOCK_M
    )  # fmt: skip
    if ends_ptr is not None:
        if rows <= 0:
            return
        if rank == 0:
            if dx_ptr is not None and not ADDS_DX:
                store_zeros(dx_ptr, first, rows, slab, K, BLOCK_M, BLOCK_L)
            return
        earlier_chunks, left_in_chunk = tl.zeros((R, BLOCK_L), tl.float32), tiles_per_chunk
    seed = tl.load(seed_ptr) if DROPOUT else 0
    da = tl.zeros((R, BLOCK_L), tl.float32)
    if dx_ptr is not None:
        a = load_slab(
            own(a_ptr, owner, stride_ag), slab, rank, K, stride_ar, stride_ak, dz_ptr.dtype.element_ty,
            R, RANK_STEP, BLOCK_L,
        )  # fmt: skip
    else:
        a = None
    for start in range(0, rows, BLOCK_M):
        first_row = first + start
        rows_left = rows_left_in(ends_ptr, M, first_row, rows, start, BLOCK_M)
        da = x_tile(
            da, dz_ptr, a, x_ptr, dx_ptr, da_ptr, first_row, rows_left, slab, K, stride_xm, seed, threshold,
            calls_per_row, R, BLOCK_M, BLOCK_L, DROPOUT, ADDS_DX, PRECISION,
        )  # fmt: skip
        if ends_ptr is not None:
            left_in_chunk -= 1
            if left_in_chunk == 0:
                earlier_chunks += da
                da = tl.zeros((R, BLOCK_L), tl.float32)
                left_in_chunk = tiles_per_chunk
    if da_ptr is not None:
        if ends_ptr is not None:
            da += earlier_chunks
        store_partial(da_ptr, da, slab, K, R, BLOCK_L)


@triton.jit
def sum_chunks(partial_ptr, rank, col, length, chunks, R: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((RANKS, BLOCK), tl.float32)
    for chunk in range(chunks):
        rows = (chunk * R + rank[:, None]).to(tl.int64)
        total += tl.load(partial_ptr + rows * length + col[None, :], mask=(col < length)[None, :], other=0.0)
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weight_gradients_kernel(
    da_partial_ptr, db_partial_ptr, da_ptr, db_ptr, ends_ptr, ranks_ptr, scaling_ptr, M, G, K, N, r, blocks_a,
    chunks, parts_a, chunks_per_part_a, rows_per_tile_a, parts_b, chunks_per_part_b, rows_per_tile_b, stride_scaling,
    scaling, R: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R, second job: ``da (r, K)`` and ``db (N, r) = scaling * sum``, rounded once, to their own dtypes; by owner
    ``da (G, r, K)`` and ``db (G, N, r)``, zero beyond the rank of an owner and where it has no rows.

    Grid: (``blocks_a`` blocks of K, then blocks of N; R / RANKS; owners). ``da_ptr`` or ``db_ptr`` None: no blocks of
    it.
    """
    block = tl.program_id(0)
    column = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    mask = (column < r)[:, None]
    owner = tl.program_id(2)
    if ends_ptr is not None:
        first, end, rank = rows_of(owner, ends_ptr, ranks_ptr, M, G, r)
        end = tl.where(rank > 0, end, first)
        in_rank = (column < rank)[:, None]
    if da_ptr is not None:
        if block < blocks_a:
            col = block * BLOCK + tl.arange(0, BLOCK)
            count = parts_a
            if ends_ptr is not None:
                count = parts_with_rows(first, end, chunks, chunks_per_part_a, rows_per_tile_a)
                da_partial_ptr += owner.to(tl.int64) * parts_a * R * K
                da_ptr += owner.to(tl.int64) * r * K
            da = sum_chunks(da_partial_ptr, column, col, K, count, R, RANKS, BLOCK)
            if ends_ptr is not None:
                da = tl.where(in_rank, da, 0.0)
            da = da.to(da_ptr.dtype.element_ty)
            tl.store(da_ptr + column[:, None] * K + col[None, :], da, mask=mask & (col < K)[None, :])
    if db_ptr is not None:
        if block >= blocks_a:
            col = (block - blocks_a) * BLOCK + tl.arange(0, BLOCK)
            count = parts_b
            if ends_ptr is not None:
                count = parts_with_rows(first, end, chunks, chunks_per_part_b, rows_per_tile_b)
                db_partial_ptr += owner.to(tl.int64) * parts_b * R * N
                db_ptr += owner.to(tl.int64) * N * r
                scaling = own_scaling(scaling_ptr, owner, stride_scaling, scaling)
            db = scaling * sum_chunks(db_partial_ptr, column, col, N, count, R, RANKS, BLOCK)
            if ends_ptr is not None:
                db = tl.where(in_rank, db, 0.0)
            db = db.to(db_ptr.dtype.element_ty)
            tl.store(db_ptr + col[None, :] * r + column[:, None], db, mask=mask & (col < N)[None, :])
