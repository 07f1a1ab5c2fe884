"""Ragged calls as a loop over the groups: the rows of each are one ordinary call.

The host reads the offsets, which on a GPU means waiting for it: only for CPU tensors, and for the reference.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from afa_kernels.backend.registry import Groups
from afa_kernels.options import Spec


def runs(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (group, its rows) for each group that has rows."""
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end


def branches(groups: Groups, r: int, spec: Spec) -> Iterator[tuple[int, slice, int, Tensor | None, Spec]]:
    """Yield (group, its rows, rank, alpha_t, spec) for each group that has rows and a branch."""
    ranks = None if groups.ranks is None else groups.ranks.tolist()
    scaling = None if groups.scaling is None else groups.scaling.tolist()
    for group, rows in runs(groups.offsets):
        rank = r if ranks is None else ranks[group]
        if rank == 0:
            continue
        alpha_t = None if groups.alpha_t is None else groups.alpha_t[group]
        yield group, rows, rank, alpha_t, spec if scaling is None else spec._replace(scaling=scaling[group])


def forward(one, x, a, b, groups: Groups, seed, spec: Spec, *, base, out, save_z):
    """``one`` is a :class:`~afa_kernels.backend.registry.Forward` that takes ``first_row``, the row of the dropout mask
    that belongs to its first row."""
    z = torch.zeros((x.shape[0], a.shape[1]), dtype=x.dtype, device=x.device) if save_z else None
    done = 0
    for group, rows, rank, alpha_t, own in branches(groups, a.shape[1], spec):
        _copy_base(base, out, slice(done, rows.start))
        done = rows.stop
        target = out[rows]
        own_base = None if base is None else target if base is out else base[rows]
        a_g, b_g = a[group, :rank], b[group, :, :rank]
        z_g = one(x[rows], a_g, b_g, alpha_t, seed, own, base=own_base, out=target, save_z=save_z, first_row=rows.start)
        if save_z:
            z[rows, :rank] = z_g
    _copy_base(base, out, slice(done, None))
    return z


def _copy_base(base: Tensor | None, out: Tensor, rows: slice) -> None:
    """Write the result of rows without a branch."""
    if base is None:
        out[rows] = 0
    elif base is not out:
        out[rows] = base[rows]


def backward(one, dy, x, a, b, groups: Groups, z, seed, spec: Spec, *, need_dx, need_da, need_db, dx=None):
    """``one`` is a :class:`~afa_kernels.backend.registry.Backward` that takes ``first_row``."""
    write = torch.Tensor.copy_ if dx is None else torch.Tensor.add_
    if need_dx and dx is None:
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    da = torch.zeros(a.shape, dtype=a.dtype, device=a.device) if need_da else None
    db = torch.zeros(b.shape, dtype=b.dtype, device=b.device) if need_db else None
    for group, rows, rank, alpha_t, own in branches(groups, a.shape[1], spec):
        dx_g, da_g, db_g = one(
            dy[rows], x[rows], a[group, :rank], b[group, :, :rank], None if z is None else z[rows, :rank],
            alpha_t, seed, own, need_dx=need_dx, need_da=need_da, need_db=need_db, first_row=rows.start,
        )  # fmt: skip
        if need_dx:
            write(dx[rows], dx_g)
        if need_da:
            da[group, :rank] = da_g
        if need_db:
            db[group, :, :rank] = db_g
    return dx, da, db
