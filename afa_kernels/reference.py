"""The operator in its plainest form: the truth that every kernel is compared with, and the double
backward of all.

``forward`` and ``backward`` consist of differentiable torch ops alone, on any device, in any dtype
and differentiable any number of times. float16 and bfloat16 operands are computed in float32.
Shapes are those of backend/registry.py.
"""

import torch
from torch import Tensor

from afa_kernels.activation import IDENTITY, phi, phi_slope
from afa_kernels.dropout import drop
from afa_kernels.options import Spec


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products accumulate: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the dtype of x, as autocast does, then widen to the dtype of computation."""
    return t.to(dtype).to(compute_dtype(dtype))


def _drop(x: Tensor, seed: Tensor | None, spec: Spec, first_row: int) -> Tensor:
    if not spec.dropout:
        return x
    return drop(x, seed, spec.dropout, first_row) * spec.inverse_keep


def _phi(z: Tensor, alpha_t: Tensor | None, spec: Spec) -> Tensor:
    return z if spec.activation == IDENTITY else phi(z, alpha_t.to(z.dtype), spec.activation)


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    alpha_t: Tensor | None,
    seed: Tensor | None,
    spec: Spec,
    base: Tensor | None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return ``base + scaling * phi(dropout(x) @ a.T) @ b.T`` in ``x.dtype``, and ``z`` in
    ``x.dtype``.

    ``first_row`` is the row of the dropout mask that belongs to the first row of x.
    """
    dtype = x.dtype
    z = (_drop(_operand(x, dtype), seed, spec, first_row) @ _operand(a, dtype).T).to(dtype)
    y = spec.scaling * (_phi(_operand(z, dtype), alpha_t, spec) @ _operand(b, dtype).T)
    if base is not None:
        y = base + y
    return y.to(dtype), z


def backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    alpha_t: Tensor | None,
    seed: Tensor | None,
    spec: Spec,
    first_row: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dx, da, db)``, each in the dtype of its input, by the closed formulas.

    With ``u = scaling * dy @ b`` and ``h = phi(z)``: ``db = scaling * dy.T @ h``, ``dz = u *
    phi'(z)``, ``da = dz.T @ dropout(x)`` and ``dx = dropout(dz @ a)`` under the same mask.
    """
    dtype = x.dtype
    x_dropped, wide_a, wide_b = (
        _drop(_operand(x, dtype), seed, spec, first_row),
        _operand(a, dtype),
        _operand(b, dtype),
    )
    wide_dy = _operand(dy, dtype)
    z = _operand((x_dropped @ wide_a.T).to(dtype), dtype)
    dz = spec.scaling * (wide_dy @ wide_b)
    if spec.activation != IDENTITY:
        dz = dz * phi_slope(z, alpha_t.to(z.dtype), spec.activation)
    dx = _drop(dz @ wide_a, seed, spec, first_row)
    da = dz.T @ x_dropped
    db = spec.scaling * (wide_dy.T @ _phi(z, alpha_t, spec))
    return dx.to(dtype), da.to(a.dtype), db.to(b.dtype)
