"""The frozen product of rows by owner and their branch in one kernel, and its launches.

torch's ``grouped_mm`` cannot accumulate, so that a branch beside it reads and writes y and dx once more. Here they are
written once: a GEMM whose accumulators begin as the branch. z, and dz in the backward, come from a pass before.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from afa_kernels.backend.triton import passes
from afa_kernels.backend.triton.device_functions import (
    UNSPECIALIZED,
    find_tile,
    keep_mask,
    load_alpha,
    load_small,
    own,
    own_scaling,
    phi,
)
from afa_kernels.backend.triton.launch import Context, addressable, int32_offsets, submit

# Terms of a product of float32 that are summed for themselves: with one accumulator for all of K the error would grow
# with it. Under the rounding of 16 bits, and of what tf32 reads, it does not show.
_SEGMENT = 256
# Tiles of rows that run side by side on the same columns of a matrix: together they read it from memory once.
_ROWS_TOGETHER = 8


@triton.jit
def branch_tile(
    z_ptr, small_ptr, alpha_ptr, scaling_ptr, seed_ptr, owner, rank, first_row, rows_left, col, columns, first_col,
    stride_z, stride_owner, stride_rank, stride_small, stride_alpha, stride_scaling, scaling, threshold, calls_per_row,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a (BLOCK_M, BLOCK_L) tile of the branch in float32, from rows of z or dz."""
    row, rank_col = tl.arange(0, BLOCK_M), tl.arange(0, R)
    mask = (row < rows_left)[:, None] & (rank_col < rank)[None, :]
    z_rows = z_ptr + first_row * stride_z + row[:, None] * stride_z
    z = tl.load(z_rows + rank_col[None, :], mask=mask, other=0.0)
    alpha_t = load_alpha(alpha_ptr, owner, stride_alpha, ACT)
    h = phi(z.to(tl.float32), alpha_t, ACT).to(z.dtype)
    small = load_small(
        own(small_ptr, owner, stride_owner), rank_col[:, None], col[None, :], rank, columns, stride_rank, stride_small,
        z.dtype, R, RANK_STEP,
    )  # fmt: skip
    branch = tl.dot(h, small, tl.zeros((BLOCK_M, BLOCK_L), tl.float32), input_precision=PRECISION)
    branch *= own_scaling(scaling_ptr, owner, stride_scaling, scaling)
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), threshold, first_row, first_col, calls_per_row, BLOCK_M, BLOCK_L)
        branch = tl.where(keep, branch, 0.0)
    return branch


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "row_tiles", "owners_per_matrix"))
def grouped_gemm_kernel(
    left_ptr, weight_ptr, bias_ptr, z_ptr, small_ptr, out_ptr, ends_ptr, ranks_ptr, alpha_ptr, scaling_ptr, seed_ptr,
    M, G, row_tiles, owners_per_matrix, length, columns, r,
    stride_left, stride_matrix, stride_length, stride_column, stride_bias, stride_z, stride_owner, stride_rank,
    stride_small, stride_alpha, stride_scaling, scaling, threshold, calls_per_row,
    ACT: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_STEP: tl.constexpr, SEGMENT: tl.constexpr, ROWS_TOGETHER: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """G: ``out = left w[e] + bias[e] + branch``, (M, columns), in one pass over left (M, length).

    Forward: left is x, w[e] is a frozen matrix transposed, the branch ``scaling * phi(z) b^T``. Backward: left is dy,
    w[e] the matrix, the branch ``drop(dz a)``: an ACT of identity, a scaling of 1, and DROPOUT.

    SEGMENT steps of the sum are summed for themselves, and these sums in order; None: all steps, onto the branch.
    ``owners_per_matrix`` owners in a row have a matrix together; without ``stride_matrix`` all have one, and so have
    rows behind the last offset, whose result is zero otherwise. Grid: (tiles of rows times tiles of columns,).
    """
    # ROWS_TOGETHER tiles of rows, then the next columns; the last ones may be fewer.
    program, column_tiles = tl.program_id(0), tl.cdiv(columns, BLOCK_L)
    first_tile = program // (ROWS_TOGETHER * column_tiles) * ROWS_TOGETHER
    together = tl.minimum(row_tiles - first_tile, ROWS_TOGETHER)
    place = program % (ROWS_TOGETHER * column_tiles)
    owner, rank, first_row, rows_left = find_tile(
        first_tile + place % together, ends_ptr, ranks_ptr, M, G, r, BLOCK_M
    )  # fmt: skip
    if rows_left <= 0:
        return
    first_col = place // together * BLOCK_L
    row, col, step = tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_STEP)
    total = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    if rank > 0:
        total = branch_tile(
            z_ptr, small_ptr, alpha_ptr, scaling_ptr, seed_ptr, owner, rank, first_row, rows_left, col, columns,
            first_col, stride_z, stride_owner, stride_rank, stride_small, stride_alpha, stride_scaling, scaling,
            threshold, calls_per_row, ACT, R, RANK_STEP, BLOCK_M, BLOCK_L, DROPOUT, PRECISION,
        )  # fmt: skip
    steps = tl.cdiv(length, BLOCK_STEP)
    if stride_matrix is not None:
        steps = tl.where(owner < G, steps, 0)
    matrix = tl.minimum(owner, G - 1) // owners_per_matrix
    row_mask, col_mask = (row < rows_left)[:, None], (col < columns)[None, :]
    lefts = left_ptr + first_row * stride_left + row[:, None] * stride_left + step[None, :]
    weights = own(weight_ptr, matrix, stride_matrix) + step[:, None] * stride_length + col[None, :] * stride_column
    segment = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    left_in_segment = SEGMENT
    for done in range(0, steps):
        left_over = length - done * BLOCK_STEP
        left = tl.load(lefts, mask=row_mask & (step < left_over)[None, :], other=0.0)
        weight = tl.load(weights, mask=(step < left_over)[:, None] & col_mask, other=0.0)
        if SEGMENT is None:
            total = tl.dot(left, weight, total, input_precision=PRECISION)
        else:
            segment = tl.dot(left, weight, segment, input_precision=PRECISION)
            left_in_segment -= 1
            if left_in_segment == 0:
                total += segment
                segment = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
                left_in_segment = SEGMENT
        lefts += BLOCK_STEP
        weights += BLOCK_STEP * stride_length
    if SEGMENT is not None:
        total += segment
    if bias_ptr is not None:
        if steps > 0:
            bias = tl.load(own(bias_ptr, matrix, stride_bias) + col, mask=col < columns, other=0.0)
            total += bias.to(tl.float32)[None, :]
    out_rows = out_ptr + first_row * columns + row[:, None] * columns
    tl.store(out_rows + col[None, :], total.to(out_ptr.dtype.element_ty), mask=row_mask & col_mask)


def takes(weight: Tensor) -> bool:
    """Whether the kernel can address each matrix of ``weight (E, N, K)`` or ``(N, K)``."""
    return int32_offsets(weight)


def forward(ctx: Context, weight: Tensor, bias: Tensor | None, save_z: bool) -> tuple[Tensor, Tensor | None]:
    """Return y and, if asked for, z."""
    z = passes.forward(ctx, None, None, True)
    branch = {"z_ptr": z, "stride_z": ctx.r, **ctx.small_operand("b"), **ctx.alpha(), **ctx.scaling()}
    return _product(ctx, ctx.x, weight.mT, bias, branch, ctx.act, dropout=False), z if save_z else None


def backward(
    ctx: Context, weight: Tensor, dy: Tensor, z: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype,
    *, need_da: bool, need_db: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return dx and, if asked for, da and db."""
    dy = addressable(dy)
    dz, db_partial = passes.dz_and_db(ctx, dy, z.contiguous(), need_dz=True, need_db=need_db)
    branch = {
        "z_ptr": dz, "stride_z": ctx.padded, **ctx.small_operand("a"), "alpha_ptr": None, "stride_alpha": None,
        "scaling": 1.0, "scaling_ptr": None, "stride_scaling": None,
    }  # fmt: skip
    dx = _product(ctx, dy, weight, None, branch, "identity", dropout=ctx.spec.dropout > 0)
    da_partial = None
    if need_da:
        _, da_partial = passes.x_pass(ctx, dz, None, need_dx=False, need_da=True)
    return dx, *passes.weight_gradients(ctx, da_partial, db_partial, a_dtype, b_dtype)


def _product(
    ctx: Context, left: Tensor, matrices: Tensor, bias: Tensor | None, branch: dict[str, Any], act: str, *,
    dropout: bool,
) -> Tensor:  # fmt: skip
    """Return ``left @ matrices[e] + bias[e] + branch``; ``matrices`` is (E, length, columns) or (length, columns)."""
    length, columns = matrices.shape[-2:]
    tile = ctx.tiles.gemm
    out = ctx.empty(ctx.rows, columns, dtype=ctx.dtype)
    several = matrices.dim() == 3
    count = matrices.shape[0] if several else 1
    bias = None if bias is None else bias.to(ctx.dtype).contiguous()
    row_tiles = ctx.row_tiles(tile.rows)
    segment = _SEGMENT // tile.step if ctx.dtype == torch.float32 and ctx.precision == "ieee" else None
    arguments = {
        "left_ptr": left, "weight_ptr": matrices, "bias_ptr": bias, "out_ptr": out, "row_tiles": row_tiles,
        "owners_per_matrix": ctx.owners[0] // count, "length": length, "columns": columns,
        "stride_left": left.stride(0), "stride_matrix": matrices.stride(0) if several else None,
        "stride_length": matrices.stride(-2), "stride_column": matrices.stride(-1),
        "stride_bias": None if bias is None or bias.dim() == 1 else columns,
        **ctx.whose_rows(), **ctx.mask(), **branch,
    }  # fmt: skip
    constants = {
        "ACT": act, "BLOCK_M": tile.rows, "BLOCK_L": tile.cols, "BLOCK_STEP": tile.step, "SEGMENT": segment,
        "ROWS_TOGETHER": _ROWS_TOGETHER, "DROPOUT": dropout, **ctx.dots(),
    }  # fmt: skip
    submit(grouped_gemm_kernel, (row_tiles * triton.cdiv(columns, tile.cols),), arguments, constants, tile)
    return out
