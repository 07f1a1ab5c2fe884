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
from afa_kernels.backend.interface import Backend, Call, Rows
from afa_kernels.operator.activation import IDENTITY, phi, phi_slope
from afa_kernels.operator.dropout import drop
from afa_kernels.operator.options import Spec
from afa_kernels.operator.reference import compute_dtype, owners
from afa_kernels.torch_private import grouped_mm


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


def _forward(x, a, b, alpha_t, seed, spec, base, out, save_z, first_row):
    z = _z(drop(x, seed, spec.dropout, first_row), a.to(x.dtype), spec)
    _write(z, b, alpha_t, spec, base, out)
    return z if save_z else None


def _backward(dy, x, a, b, z, alpha_t, seed, spec, first_row, need_dx, need_da, need_db):
    dx = da = None
    db = _db(dy, b, z, alpha_t, spec) if need_db else None
    if need_dx or need_da:
        dz = _dz(dy, b, z, alpha_t, spec)
        if need_dx:
            dx = drop(dz @ a.to(x.dtype), seed, spec.dropout, first_row)
        if need_da:
            da = _mm_into(dz.T, drop(x, seed, spec.dropout, first_row), a.dtype)
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


# --- rows by owner: on a CPU, and in float64, the rows of each owner are one ordinary call


def _on_device(x: Tensor) -> bool:
    """Whether torch reads the offsets itself."""
    return not x.is_cpu and torch_private.has_grouped_mm(x.dtype)


def _forward_in_loop(x, a, b, alpha_t, seed, spec, rows, base, out, save_z):
    z = torch.zeros((x.shape[0], a.shape[1]), dtype=x.dtype, device=x.device) if save_z else None
    done = 0
    for owner, own, rank, alpha, own_spec in owners(rows, a.shape[1], alpha_t, spec):
        if rank == 0:
            continue
        _copy_base(base, out, slice(done, own.start))
        done = own.stop
        target = out[own]
        own_base = None if base is None else target if base is out else base[own]
        a_own, b_own = a[owner, :rank], b[owner, :, :rank]
        z_own = _forward(x[own], a_own, b_own, alpha, seed, own_spec, own_base, target, save_z, own.start)
        if save_z:
            z[own, :rank] = z_own
    _copy_base(base, out, slice(done, None))
    return z


def _copy_base(base: Tensor | None, out: Tensor, rows: slice) -> None:
    """Write the result of rows without a branch."""
    if base is None:
        out[rows] = 0
    elif base is not out:
        out[rows] = base[rows]


def _backward_in_loop(dy, x, a, b, z, alpha_t, seed, spec, rows, dx, need_dx, need_da, need_db):
    write = torch.Tensor.copy_ if dx is None else torch.Tensor.add_
    if need_dx and dx is None:
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    da = torch.zeros(a.shape, dtype=a.dtype, device=a.device) if need_da else None
    db = torch.zeros(b.shape, dtype=b.dtype, device=b.device) if need_db else None
    for owner, own, rank, alpha, own_spec in owners(rows, a.shape[1], alpha_t, spec):
        if rank == 0:
            continue
        dx_own, da_own, db_own = _backward(
            dy[own], x[own], a[owner, :rank], b[owner, :, :rank], z[own, :rank], alpha, seed, own_spec, own.start,
            need_dx, need_da, need_db,
        )  # fmt: skip
        if need_dx:
            write(dx[own], dx_own)
        if need_da:
            da[owner, :rank] = da_own
        if need_db:
            db[owner, :, :rank] = db_own
    return dx, da, db


# --- rows by owner, on a GPU: every intermediate is (T, r) or of the size of A or B, but for the product with B


def owner_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Return ``(rows,)`` int64, the owner of each row, without waiting for the device; the last one for rows behind the
    last offset."""
    row = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, row, right=True).clamp_(max=offsets.shape[0] - 1)


class _ByOwner:
    """What the rows of a call get from their owners, for torch's ``grouped_mm``, whose offsets stay on the device.

    Rows behind the last offset are undefined in what ``grouped_mm`` returns; here they are zeros.
    """

    def __init__(self, x: Tensor, alpha_t: Tensor | None, spec: Spec, rows: Rows):
        self.owner = owner_of_rows(rows.offsets, x.shape[0])
        self.outside = (torch.arange(x.shape[0], device=x.device) >= rows.offsets[-1])[:, None]
        self.offsets, self.ranks, self.spec = rows.offsets, rows.ranks, spec
        self.wide = compute_dtype(x.dtype)
        self.alpha_t = None if alpha_t is None else self._each(alpha_t)
        self.scaling = spec.scaling if rows.scaling is None else self._each(rows.scaling)

    def _each(self, values: Tensor) -> Tensor:
        return values.to(self.wide)[self.owner][:, None]

    def columns(self, factor: Tensor) -> Tensor:
        """Return B, or A transposed, ``(G, n, r)``, with zeros beyond the rank of each owner."""
        if self.ranks is None:
            return factor
        beyond = torch.arange(factor.shape[2], device=factor.device) >= self.ranks[:, None]
        return factor.masked_fill(beyond[:, None], 0)

    def product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        return grouped_mm(rows, matrices, self.offsets).masked_fill_(self.outside, 0)

    def of_rank(self, t: Tensor) -> Tensor:
        """Return z or dz with zeros beyond the rank of each owner: an infinity times the zeros there is NaN."""
        if self.ranks is None:
            return t
        return t.masked_fill_(torch.arange(t.shape[1], device=t.device) >= self.ranks[self.owner][:, None], 0)

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``left.T @ right`` of each owner's rows."""
        return grouped_mm(left.T, right, self.offsets)

    def h(self, z: Tensor) -> Tensor:
        """Return ``scaling * phi(z)``."""
        wide = z.to(self.wide)
        if self.spec.activation != IDENTITY:
            wide = phi(wide, self.alpha_t, self.spec.activation)
        return (self.scaling * wide).to(z.dtype)


def _z_by_owner(x_dropped: Tensor, a_transposed: Tensor, own: _ByOwner) -> Tensor:
    z = own.of_rank(own.product(x_dropped, a_transposed))
    return z.mul_(own.spec.inverse_keep) if own.spec.dropout else z


def _forward_together(x, a, b, alpha_t, seed, spec, rows, base, out, save_z):
    own = _ByOwner(x, alpha_t, spec, rows)
    z = _z_by_owner(drop(x, seed, spec.dropout), own.columns(a.to(x.dtype).transpose(1, 2)), own)
    y = own.product(own.h(z), own.columns(b.to(x.dtype)).transpose(1, 2))
    if base is None:
        out.copy_(y)
    else:
        torch.add(base, y, out=out)
    return z if save_z else None


def _backward_together(dy, x, a, b, z, alpha_t, seed, spec, rows, dx, need_dx, need_da, need_db):
    own = _ByOwner(x, alpha_t, spec, rows)
    da = None
    db = own.columns(own.sums(dy, own.h(z)).to(b.dtype)) if need_db else None
    if need_dx or need_da:
        factor = own.scaling * (spec.inverse_keep if spec.dropout else 1.0)
        dz = own.of_rank(own.product(dy, own.columns(b.to(x.dtype)))).to(own.wide) * factor
        if spec.activation != IDENTITY:
            dz = dz * phi_slope(z.to(own.wide), own.alpha_t, spec.activation)
        dz = dz.to(dy.dtype)
        a_transposed = own.columns(a.to(x.dtype).transpose(1, 2))
        if need_dx:
            own_dx = drop(own.product(dz, a_transposed.transpose(1, 2)), seed, spec.dropout)
            dx = own_dx if dx is None else dx.add_(own_dx)
        if need_da:
            da = own.sums(dz, drop(x, seed, spec.dropout)).to(a.dtype)
            da = own.columns(da.transpose(1, 2)).transpose(1, 2)
    return dx, da, db


class TorchBackend(Backend):
    name = "torch"
    takes_shared_input = True

    def refuses(self, call: Call) -> str | None:
        if call.owners and call.device != "cpu" and not torch_private.has_grouped_mm():
            return "needs a torch with grouped_mm (2.8 or later) for rows by owner on a GPU"
        return None

    def forward(self, x, a, b, alpha_t, seed, spec, rows=None, *, base, out, save_z):
        if rows is None:
            return _forward(x, a, b, alpha_t, seed, spec, base, out, save_z, 0)
        by_owner = _forward_together if _on_device(x) else _forward_in_loop
        return by_owner(x, a, b, alpha_t, seed, spec, rows, base, out, save_z)

    def backward(self, dy, x, a, b, z, alpha_t, seed, spec, rows=None, *, need_dx, need_da, need_db, dx=None):
        needs = (need_dx, need_da, need_db)
        if rows is None:
            return _backward(dy, x, a, b, z, alpha_t, seed, spec, 0, *needs)
        by_owner = _backward_together if _on_device(x) else _backward_in_loop
        return by_owner(dy, x, a, b, z, alpha_t, seed, spec, rows, dx, *needs)

    def forward_shared(self, x, members, *, bases, outs, save_z):
        zs = _zs(x, [m.a.to(x.dtype) for m in members])
        for m, z, base, out in zip(members, zs, bases, outs, strict=True):
            _write(z, m.b, m.alpha_t, m.spec, base, out)
        return zs if save_z else None

    def backward_shared(self, dys, x, members, zs, *, need_dx, need_da, need_db):
        a = [m.a.to(x.dtype) for m in members]
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


BACKEND = TorchBackend()
