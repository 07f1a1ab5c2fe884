"""Ragged calls of the ``torch`` backend on a GPU: torch's ``grouped_mm``, whose offsets stay on the device.

Every intermediate is ``(T, r)`` or of the size of A or B, but for the product with B and, with dropout, the dropped x.
Rows behind the last offset are undefined in what ``grouped_mm`` returns; here they are zeros.
"""

import torch
from torch import Tensor

from afa_kernels.activation import IDENTITY, phi, phi_slope
from afa_kernels.backend.registry import Groups
from afa_kernels.dropout import drop
from afa_kernels.options import Spec
from afa_kernels.reference import compute_dtype
from afa_kernels.torch_private import grouped_mm


def group_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Return ``(rows,)`` int64, the group of each row, without waiting for the device; the last one for rows behind the
    last offset."""
    row = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, row, right=True).clamp_(max=offsets.shape[0] - 1)


class _Rows:
    """What the rows of a call get from their groups."""

    def __init__(self, x: Tensor, groups: Groups, spec: Spec):
        self.group = group_of_rows(groups.offsets, x.shape[0])
        self.outside = (torch.arange(x.shape[0], device=x.device) >= groups.offsets[-1])[:, None]
        self.offsets, self.ranks, self.spec = groups.offsets, groups.ranks, spec
        self.wide = compute_dtype(x.dtype)
        self.alpha_t = None if groups.alpha_t is None else self._each(groups.alpha_t)
        self.scaling = spec.scaling if groups.scaling is None else self._each(groups.scaling)

    def _each(self, values: Tensor) -> Tensor:
        return values.to(self.wide)[self.group][:, None]

    def columns(self, factor: Tensor) -> Tensor:
        """Return B, or A transposed, ``(G, n, r)``, with zeros beyond the rank of each group."""
        if self.ranks is None:
            return factor
        beyond = torch.arange(factor.shape[2], device=factor.device) >= self.ranks[:, None]
        return factor.masked_fill(beyond[:, None], 0)

    def product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        return grouped_mm(rows, matrices, self.offsets).masked_fill_(self.outside, 0)

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``left.T @ right`` of each group's rows."""
        return grouped_mm(left.T, right, self.offsets)

    def h(self, z: Tensor) -> Tensor:
        """Return ``scaling * phi(z)``."""
        wide = z.to(self.wide)
        if self.spec.activation != IDENTITY:
            wide = phi(wide, self.alpha_t, self.spec.activation)
        return (self.scaling * wide).to(z.dtype)


def _z(x_dropped: Tensor, a_transposed: Tensor, rows: _Rows) -> Tensor:
    z = rows.product(x_dropped, a_transposed)
    return z.mul_(rows.spec.inverse_keep) if rows.spec.dropout else z


def forward(x, a, b, groups: Groups, seed, spec: Spec, *, base, out, save_z):
    rows = _Rows(x, groups, spec)
    z = _z(drop(x, seed, spec.dropout), rows.columns(a.to(x.dtype).transpose(1, 2)), rows)
    y = rows.product(rows.h(z), rows.columns(b.to(x.dtype)).transpose(1, 2))
    if base is None:
        out.copy_(y)
    else:
        torch.add(base, y, out=out)
    return z if save_z else None


def backward(dy, x, a, b, groups: Groups, z, seed, spec: Spec, *, need_dx, need_da, need_db, dx=None):
    rows = _Rows(x, groups, spec)
    a_transposed, own_b = rows.columns(a.to(x.dtype).transpose(1, 2)), rows.columns(b.to(x.dtype))
    x_dropped = drop(x, seed, spec.dropout) if need_da or z is None else x
    if z is None:
        z = _z(x_dropped, a_transposed, rows)
    da = None
    db = rows.sums(dy, rows.h(z)).to(b.dtype) if need_db else None
    if need_dx or need_da:
        factor = rows.scaling * (spec.inverse_keep if spec.dropout else 1.0)
        dz = rows.product(dy, own_b).to(rows.wide) * factor
        if spec.activation != IDENTITY:
            dz = dz * phi_slope(z.to(rows.wide), rows.alpha_t, spec.activation)
        dz = dz.to(dy.dtype)
        if need_dx:
            own_dx = drop(rows.product(dz, a_transposed.transpose(1, 2)), seed, spec.dropout)
            dx = own_dx if dx is None else dx.add_(own_dx)
        if need_da:
            da = rows.sums(dz, x_dropped).to(a.dtype)
    return dx, rows.columns(da.transpose(1, 2)).transpose(1, 2) if need_da else None, db
