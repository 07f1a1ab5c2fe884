"""The launches of a forward and of a backward, in order."""

from typing import Any

import torch
import triton
from torch import Tensor

from afa_kernels.backend.triton import backward_kernels, configs, forward_kernels
from afa_kernels.backend.triton.launch import (
    ELEMENTWISE,
    Context,
    addressable,
    int32_offsets,
    segment_columns,
    submit,
)

# What one program of a reduction sums: elements of dz in whole rows (16 rows at least); ranks and
# columns of dA and dB.
_REDUCE_ELEMENTS, _REDUCE_MIN_ROWS = 1024, 16
_REDUCE_RANKS, _REDUCE_COLS = 16, 32


def _base_arguments(base: Tensor | None, out: Tensor | None) -> dict[str, Any]:
    base_strides, out_strides = ((0, 1) if t is None else t.stride() for t in (base, out))
    return {
        "base_ptr": base, "stride_base_m": base_strides[0], "stride_base_n": base_strides[1],
        "y_ptr": out, "stride_ym": out_strides[0], "stride_yn": out_strides[1],
    }  # fmt: skip


def _tile_fits(t: Tensor) -> bool:
    return int32_offsets(t, configs.MAX_TILE_ROWS)


def forward(ctx: Context, base: Tensor | None, out: Tensor | None, save_z: bool) -> Tensor | None:
    """Write y into ``out``, unless that is None, and return z if asked for: F, or F1 and F2 where rows are few."""
    if base is not None and base is not out and not _tile_fits(base):
        base = base.contiguous()
    if out is not None and not _tile_fits(out):
        y = torch.empty_like(out, memory_format=torch.contiguous_format)
        z = forward(ctx, base.contiguous() if base is out else base, y, save_z)
        out.copy_(y)
        return z
    z = ctx.empty(ctx.rows, ctx.r, dtype=ctx.dtype) if save_z else None
    tile = ctx.tiles.project
    shared = {
        "z_ptr": z, "N": ctx.n, "r": ctx.r, "inverse_keep": ctx.spec.inverse_keep, **ctx.whose_rows(),
        **ctx.operand_b(), **ctx.alpha(), **ctx.scaling(), **_base_arguments(base, out),
    }  # fmt: skip
    constants = {"ACT": ctx.act, "BLOCK_M": tile.rows, "BLOCK_N": ctx.tiles.out_cols, **ctx.dots()}
    if ctx.one_program(ctx.k):
        arguments = {
            "x_ptr": ctx.x, "K": ctx.k, "stride_xm": ctx.x.stride(0), "segment_tiles": ctx.segment_tiles(ctx.k),
            **ctx.operand_a(), **ctx.mask(), **shared,
        }  # fmt: skip
        constants |= {"BLOCK_L": tile.cols, "DROPOUT": ctx.spec.dropout > 0}
        submit(forward_kernels.xa_phi_hb_forward_kernel, (ctx.row_programs(),), arguments, constants, tile)
        return z
    partial = _project_partials(ctx, ctx.x, "a", dropout=ctx.spec.dropout > 0)
    constants["DTYPE"] = _triton_dtype(ctx.dtype)
    columns, tiles = (1, 0) if out is None else ctx.spread(triton.cdiv(ctx.n, ctx.tiles.out_cols))
    arguments = {"partial_ptr": partial, "segments": partial.shape[0], "tiles": tiles, **shared}
    grid = (ctx.row_programs(), columns)
    submit(forward_kernels.phi_hb_forward_kernel, grid, arguments, constants, tile)
    return z


def _triton_dtype(dtype: torch.dtype) -> triton.language.dtype:
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def _project_partials(ctx: Context, left: Tensor, small: str, *, dropout: bool) -> Tensor:
    """Return float32 partials (segments, M, R) of the product of ``left`` with "a" transposed, or with "b"."""
    tile = ctx.tiles.project
    length = left.shape[1]
    segments = triton.cdiv(length, segment_columns(length))
    partial = ctx.empty(segments, ctx.rows, ctx.padded)
    arguments = {
        "left_ptr": left, "partial_ptr": partial, "length": length, "segment_tiles": ctx.segment_tiles(length),
        "stride_row": left.stride(0), **ctx.whose_rows(), **ctx.small_operand(small), **ctx.mask(),
    }  # fmt: skip
    constants = {"BLOCK_M": tile.rows, "BLOCK_L": tile.cols, "DROPOUT": dropout, **ctx.dots()}
    submit(forward_kernels.project_partial_kernel, (ctx.row_programs(), segments), arguments, constants, tile)
    return partial


def backward(
    ctx: Context, dy: Tensor, z: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype,
    *, need_dx: bool, need_da: bool, need_db: bool, dx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return dx, da and db: D, R, X, R for small ranks; D1, D2, X, R for large ones."""
    if not (need_dx or need_da or need_db):
        return None, None, None
    need_dz = need_dx or need_da
    dz, db_partial = dz_and_db(ctx, addressable(dy), z.contiguous(), need_dz=need_dz, need_db=need_db)
    da_partial = None
    if need_dz:
        dx, da_partial = x_pass(ctx, dz, dx, need_dx=need_dx, need_da=need_da)
    return dx, *weight_gradients(ctx, da_partial, db_partial, a_dtype, b_dtype)


def dz_and_db(
    ctx: Context, dy: Tensor, z: Tensor, *, need_dz: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return dz (M, R) and partials of db, each if needed: D and R, or D1 and D2."""
    if need_dz and ctx.padded <= configs.ONE_PASS_RANK:
        dh_partial, db_partial = _dy_pass(ctx, dy, z, need_dh=True, need_db=need_db)
        return _dz_from_partials(ctx, dh_partial, z), db_partial
    dz = _dz(ctx, dy, z) if need_dz else None
    db_partial = _dy_pass(ctx, dy, z, need_dh=False, need_db=True)[1] if need_db else None
    return dz, db_partial


def _dy_pass(
    ctx: Context, dy: Tensor, z: Tensor, *, need_dh: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    tile = ctx.dy_tile()
    slabs = triton.cdiv(ctx.n, tile.cols)
    split = ctx.split(tile, slabs)
    dh = ctx.empty(slabs, ctx.rows, ctx.padded) if need_dh else None
    db = ctx.empty(split.partials, ctx.padded, ctx.n) if need_db else None
    arguments = {
        "dy_ptr": dy, "z_ptr": z, "dh_ptr": dh, "db_ptr": db, "N": ctx.n, "r": ctx.r, "stride_dym": dy.stride(0),
        **ctx.whose_rows(), **ctx.operand_b(), **ctx.alpha(), **split.arguments,
    }  # fmt: skip
    constants = {"ACT": ctx.act, "BLOCK_M": tile.rows, "BLOCK_L": tile.cols, **ctx.dots()}
    submit(backward_kernels.dy_pass_backward_kernel, (slabs, split.programs), arguments, constants, tile)
    return dh, db


def _dz_arguments(ctx: Context, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
    dz = ctx.empty(ctx.rows, ctx.padded, dtype=ctx.dtype)
    return dz, {"z_ptr": z, "dz_ptr": dz, "r": ctx.r, **ctx.whose_rows(), **ctx.alpha(), **ctx.factor()}


def _dz_from_partials(ctx: Context, dh_partial: Tensor, z: Tensor) -> Tensor:
    dz, arguments = _dz_arguments(ctx, z)
    arguments |= {"partial_ptr": dh_partial, "count": dh_partial.shape[0]}
    rows = max(_REDUCE_ELEMENTS // ctx.padded, _REDUCE_MIN_ROWS)
    constants = {"ACT": ctx.act, "R": ctx.padded, "BLOCK_M": rows}
    submit(backward_kernels.dphi_backward_kernel, (ctx.row_tiles(rows),), arguments, constants, ELEMENTWISE)
    return dz


def _dz(ctx: Context, dy: Tensor, z: Tensor) -> Tensor:
    """D1, with a program for each segment of the columns of dy where rows are few."""
    tile = ctx.tiles.project
    if not ctx.one_program(ctx.n):
        partial = _project_partials(ctx, dy, "b", dropout=False)
        return _dz_from_partials(ctx, partial, z)
    dz, arguments = _dz_arguments(ctx, z)
    arguments |= {
        "dy_ptr": dy, "N": ctx.n, "segment_tiles": ctx.segment_tiles(ctx.n), "stride_dym": dy.stride(0),
        **ctx.operand_b(),
    }  # fmt: skip
    constants = {"ACT": ctx.act, "BLOCK_M": tile.rows, "BLOCK_L": tile.cols, **ctx.dots()}
    submit(backward_kernels.dyb_dphi_backward_kernel, (ctx.row_programs(),), arguments, constants, tile)
    return dz


def x_pass(
    ctx: Context, dz: Tensor, dx: Tensor | None, *, need_dx: bool, need_da: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx, added to the one that is given, and partials of da, each if needed."""
    tile = ctx.x_tile()
    slabs = triton.cdiv(ctx.k, tile.cols)
    split = ctx.split(tile, slabs)
    adds_dx = dx is not None
    if need_dx and not adds_dx:
        dx = ctx.empty(ctx.rows, ctx.k, dtype=ctx.dtype)
    da = ctx.empty(split.partials, ctx.padded, ctx.k) if need_da else None
    arguments = {
        "dz_ptr": dz, "x_ptr": ctx.x, "dx_ptr": dx, "da_ptr": da, "K": ctx.k, "stride_xm": ctx.x.stride(0),
        "r": ctx.r, **ctx.whose_rows(), **ctx.operand_a(), **ctx.mask(), **split.arguments,
    }  # fmt: skip
    constants = {
        "BLOCK_M": tile.rows, "BLOCK_L": tile.cols, "DROPOUT": ctx.spec.dropout > 0, "ADDS_DX": adds_dx, **ctx.dots(),
    }  # fmt: skip
    submit(backward_kernels.x_pass_backward_kernel, (slabs, split.programs), arguments, constants, tile)
    return dx, da


def weight_gradients(
    ctx: Context,
    da_partial: Tensor | None,
    db_partial: Tensor | None,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Sum the partials in order: float32 gradients of float32 weights come straight from the
    accumulators."""
    if da_partial is None and db_partial is None:
        return None, None
    da = None if da_partial is None else ctx.empty(*ctx.owners, ctx.r, ctx.k, dtype=a_dtype)
    db = None if db_partial is None else ctx.empty(*ctx.owners, ctx.n, ctx.r, dtype=b_dtype)
    blocks_a = 0 if da is None else triton.cdiv(ctx.k, _REDUCE_COLS)
    blocks_b = 0 if db is None else triton.cdiv(ctx.n, _REDUCE_COLS)
    arguments = {
        "da_partial_ptr": da_partial, "db_partial_ptr": db_partial, "da_ptr": da, "db_ptr": db,
        "K": ctx.k, "N": ctx.n, "r": ctx.r, "blocks_a": blocks_a, **ctx.scaling(),
        **ctx.reduction(da_partial, db_partial),
    }  # fmt: skip
    constants = {"R": ctx.padded, "RANKS": _REDUCE_RANKS, "BLOCK": _REDUCE_COLS}
    grid = (blocks_a + blocks_b, ctx.padded // _REDUCE_RANKS, *ctx.owners)
    submit(backward_kernels.weight_gradients_kernel, grid, arguments, constants, ELEMENTWISE)
    return da, db
