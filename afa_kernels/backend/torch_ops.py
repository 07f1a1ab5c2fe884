"""The ``torch`` backend: the operator as few torch ops, in the order that moves the least memory.

Every intermediate is ``(M, r)`` or smaller, and the two large results are accumulated in place by
``addmm_``, so that x and y are each passed over once in the forward. It is the fallback on every
device, and the baseline that each kernel has to beat.

With float32 ``a`` or ``b`` beside 16-bit ``x``, the two weight gradients leave the GEMM in float32
where torch can do so (CUDA, torch 2.8 and later) and are rounded to the 16-bit dtype elsewhere, as
under autocast.
"""

import torch
from torch import Tensor

from afa_kernels import torch_private
from afa_kernels.activation import IDENTITY, phi, phi_slope
from afa_kernels.backend import group_loop, torch_ragged
from afa_kernels.backend.registry import Backend, BackendStatus, Call
from afa_kernels.dropout import drop
from afa_kernels.options import Spec
from afa_kernels.reference import compute_dtype


def _z(x_dropped: Tensor, a: Tensor, spec: Spec) -> Tensor:
    z = x_dropped @ a.T
    return z.mul_(spec.inverse_keep) if spec.dropout else z


def _h(z: Tensor, alpha_t: Tensor | None, spec: Spec) -> Tensor:
    if spec.activation == IDENTITY:
        return z
    wide = compute_dtype(z.dtype)
    return phi(z.to(wide), alpha_t.to(wide), spec.activation).to(z.dtype)


def _mm_into(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``left @ right`` in ``dtype``, straight from the accumulators where torch offers
    that."""
    if left.is_cuda and dtype == torch.float32 != left.dtype and _cuda_mm_has_out_dtype():
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _cuda_mm_has_out_dtype() -> bool:
    return hasattr(torch.ops.aten.mm, "dtype")


def _write(z: Tensor, b: Tensor, alpha_t: Tensor | None, spec: Spec, base: Tensor | None, out: Tensor) -> None:
    h, b = _h(z, alpha_t, spec), b.to(z.dtype)
    if base is None:
        out.addmm_(h, b.T, beta=0, alpha=spec.scaling)  # beta = 0: what out held is not read
    else:
        if base is not out:
            out.copy_(base)
        out.addmm_(h, b.T, alpha=spec.scaling)


def _dz(dy: Tensor, b: Tensor, z: Tensor, alpha_t: Tensor | None, spec: Spec) -> Tensor:
    wide = compute_dtype(dy.dtype)
    dz = (dy @ b.to(dy.dtype)).to(wide) * (spec.scaling * (spec.inverse_keep if spec.dropout else 1.0))
    if spec.activation != IDENTITY:
        dz = dz * phi_slope(z.to(wide), alpha_t.to(wide), spec.activation)
    return dz.to(dy.dtype)


def _db(dy: Tensor, b: Tensor, z: Tensor, alpha_t: Tensor | None, spec: Spec) -> Tensor:
    return _mm_into(dy.T, _h(z, alpha_t, spec), b.dtype).mul_(spec.scaling)


def forward(x, a, b, alpha_t, seed, spec, *, base, out, save_z, first_row=0):
    z = _z(drop(x, seed, spec.dropout, first_row), a.to(x.dtype), spec)
    _write(z, b, alpha_t, spec, base, out)
    return z if save_z else None


def backward(dy, x, a, b, z, alpha_t, seed, spec, *, need_dx, need_da, need_db, first_row=0):
    x_dropped = drop(x, seed, spec.dropout, first_row) if need_da or z is None else x
    if z is None:
        z = _z(x_dropped, a.to(x.dtype), spec)
    dx = da = None
    db = _db(dy, b, z, alpha_t, spec) if need_db else None
    if need_dx or need_da:
        dz = _dz(dy, b, z, alpha_t, spec)
        if need_dx:
            dx = drop(dz @ a.to(x.dtype), seed, spec.dropout, first_row)
        if need_da:
            da = _mm_into(dz.T, x_dropped, a.dtype)
    return dx, da, db


# --- layers that share x


# From this many rows on, one product with the stacked A of all members beats one with each (on a Zen 4, r = 16: up to
# 2.4 times as fast in bfloat16 and 1.3 times in float32; at 8 rows 0.7 times in float32).
_STACKED_ROWS = 64


def _zs(x: Tensor, a: list[Tensor]) -> list[Tensor]:
    if x.shape[0] < _STACKED_ROWS:
        return [x @ a_i.T for a_i in a]
    ranks = [a_i.shape[0] for a_i in a]
    return [z.contiguous() for z in (x @ torch.cat(a).T).split(ranks, 1)]


def group_forward(x, members, *, bases, outs, save_z):
    zs = _zs(x, [m.a.to(x.dtype) for m in members])
    for m, z, base, out in zip(members, zs, bases, outs, strict=True):
        _write(z, m.b, m.alpha_t, m.spec, base, out)
    return zs if save_z else None


def group_backward(dys, x, members, zs, *, need_dx, need_da, need_db):
    a = [m.a.to(x.dtype) for m in members]
    if zs is None:
        zs = _zs(x, a)
    saved = list(zip(dys, zs, members, strict=True))
    db = [
        _db(dy, m.b, z, m.alpha_t, m.spec) if needed else None
        for (dy, z, m), needed in zip(saved, need_db, strict=True)
    ]
    dx, da = None, [None] * len(members)
    if need_dx or any(need_da):
        dzs = [_dz(dy, m.b, z, m.alpha_t, m.spec) for dy, z, m in saved]
        if need_dx:
            dx = torch.cat(dzs, 1) @ torch.cat(a)
        da = [
            _mm_into(dz.T, x, m.a.dtype) if needed else None
            for dz, m, needed in zip(dzs, members, need_da, strict=True)
        ]
    return dx, da, db


# --- rows sorted by group


def ragged_forward(x, a, b, groups, seed, spec, **results):
    if x.is_cpu:
        return group_loop.forward(forward, x, a, b, groups, seed, spec, **results)
    return torch_ragged.forward(x, a, b, groups, seed, spec, **results)


def ragged_backward(dy, x, a, b, groups, z, seed, spec, **needs):
    if x.is_cpu:
        return group_loop.backward(backward, dy, x, a, b, groups, z, seed, spec, **needs)
    return torch_ragged.backward(dy, x, a, b, groups, z, seed, spec, **needs)


def _refuses(call: Call) -> str | None:
    if call.groups and call.device != "cpu" and not torch_private.has_grouped_mm():
        return "needs a torch with grouped_mm (2.8 or later) for rows that are sorted by group on a GPU"
    return None


BACKEND = Backend(
    name="torch",
    devices=frozenset(),
    status=lambda: BackendStatus(True, details={"torch": torch.__version__}),
    forward=forward,
    backward=backward,
    refuses=_refuses,
    ragged_forward=ragged_forward,
    ragged_backward=ragged_backward,
    group_forward=group_forward,
    group_backward=group_backward,
)
