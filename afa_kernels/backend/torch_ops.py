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

from afa_kernels.activation import IDENTITY, phi, phi_slope
from afa_kernels.backend.registry import Backend, BackendStatus
from afa_kernels.dropout import keep_mask
from afa_kernels.options import Spec
from afa_kernels.reference import compute_dtype


def _drop(t: Tensor, seed: Tensor | None, spec: Spec) -> Tensor:
    """Zero the dropped elements; the factor of inverted dropout is left to the (M, r) side."""
    return t * keep_mask(seed, *t.shape, spec.dropout) if spec.dropout else t


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


def forward(x, a, b, alpha_t, seed, spec, *, base, out, save_z):
    a, b = a.to(x.dtype), b.to(x.dtype)
    z = _z(_drop(x, seed, spec), a, spec)
    h = _h(z, alpha_t, spec)
    if base is None:
        out.addmm_(h, b.T, beta=0, alpha=spec.scaling)  # beta = 0: what out held is not read
    else:
        if base is not out:
            out.copy_(base)
        out.addmm_(h, b.T, alpha=spec.scaling)
    return z if save_z else None


def backward(dy, x, a, b, z, alpha_t, seed, spec, *, need_dx, need_da, need_db):
    a_dtype, b_dtype = a.dtype, b.dtype
    a, b = a.to(x.dtype), b.to(x.dtype)
    x_dropped = _drop(x, seed, spec) if spec.dropout and (need_da or z is None) else x
    if z is None:
        z = _z(x_dropped, a, spec)
    dx = da = db = None
    if need_db:
        db = _mm_into(dy.T, _h(z, alpha_t, spec), b_dtype).mul_(spec.scaling)
    if need_dx or need_da:
        wide = compute_dtype(x.dtype)
        dz = (dy @ b).to(wide) * (spec.scaling * (spec.inverse_keep if spec.dropout else 1.0))
        if spec.activation != IDENTITY:
            dz = dz * phi_slope(z.to(wide), alpha_t.to(wide), spec.activation)
        dz = dz.to(x.dtype)
        if need_dx:
            dx = _drop(dz @ a, seed, spec)
        if need_da:
            da = _mm_into(dz.T, x_dropped, a_dtype)
    return dx, da, db


BACKEND = Backend(
    name="torch",
    devices=frozenset(),
    status=lambda: BackendStatus(True, details={"torch": torch.__version__}),
    forward=forward,
    backward=backward,
)
