"""The operator in its plainest form: the truth that every kernel is compared with, and the double
backward of all.

``forward`` and ``backward`` consist of differentiable torch ops alone, on any device, in any dtype
and differentiable any number of times. float16 and bfloat16 operands are computed in float32.
Shapes are those of backend/interface.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from afa_kernels.operator.activation import IDENTITY, phi, phi_slope
from afa_kernels.operator.dropout import drop
from afa_kernels.operator.options import Spec


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


class Own(NamedTuple):
    """What one owner of rows computes with."""

    owner: int
    rows: slice  # of x
    rank: int  # 0: no branch
    alpha_t: Tensor | None
    spec: Spec


def owners(rows, r: int, alpha_t: Tensor | None, spec: Spec) -> Iterator[Own]:
    """Yield each owner that has rows; ``rows`` as in backend/interface.py. The host reads the offsets, and waits for a
    GPU to have them."""
    ranks = None if rows.ranks is None else rows.ranks.tolist()
    scaling = None if rows.scaling is None else rows.scaling.tolist()
    start = 0
    for owner, end in enumerate(rows.offsets.tolist()):
        if end > start:
            yield Own(
                owner,
                slice(start, end),
                r if ranks is None else ranks[owner],
                None if alpha_t is None else alpha_t[owner],
                spec if scaling is None else spec._replace(scaling=scaling[owner]),
            )
            start = end


def forward_by_owner(x, a, b, alpha_t, seed, spec, rows, base) -> tuple[Tensor, Tensor]:
    """:func:`forward` for the rows of each owner, ``a (G, r, K)`` and ``b (G, N, r)``."""
    ys, zs, end = [], [], 0

    def without_branch(some: slice) -> None:
        count = len(range(*some.indices(x.shape[0])))
        ys.append(x.new_zeros(count, b.shape[1]) if base is None else base[some].to(x.dtype))
        zs.append(x.new_zeros(count, a.shape[1]))

    for owner, own, rank, alpha, own_spec in owners(rows, a.shape[1], alpha_t, spec):
        end = own.stop
        if rank == 0:
            without_branch(own)
            continue
        own_base = None if base is None else base[own]
        y, z = forward(x[own], a[owner, :rank], b[owner, :, :rank], alpha, seed, own_spec, own_base, own.start)
        ys.append(y)
        zs.append(torch.nn.functional.pad(z, (0, a.shape[1] - rank)))
    without_branch(slice(end, None))
    return torch.cat(ys), torch.cat(zs)


def backward_by_owner(dy, x, a, b, alpha_t, seed, spec, rows) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward` for the rows of each owner."""
    dxs, end = [], 0
    das, dbs = ([torch.zeros_like(matrix) for matrix in each] for each in (a, b))
    for owner, own, rank, alpha, own_spec in owners(rows, a.shape[1], alpha_t, spec):
        end = own.stop
        if rank == 0:
            dxs.append(torch.zeros_like(x[own]))
            continue
        own_a, own_b = a[owner, :rank], b[owner, :, :rank]
        dx, da, db = backward(dy[own], x[own], own_a, own_b, alpha, seed, own_spec, own.start)
        dxs.append(dx)
        das[owner] = torch.cat([da, das[owner][rank:]])
        dbs[owner] = torch.cat([db, dbs[owner][:, rank:]], 1)
    return torch.cat([*dxs, torch.zeros_like(x[end:])]), torch.stack(das), torch.stack(dbs)


def product_by_owner(rows_of_x: Tensor, matrices: Tensor, rows) -> Tensor:
    """Return ``rows_of_x @ matrices[g]`` for the rows of each owner, several owners in a row to a matrix; zeros for
    rows without an owner."""
    owners_each = rows.offsets.shape[0] // matrices.shape[0]
    products, start = [], 0
    for matrix, end in zip(matrices, rows.offsets[owners_each - 1 :: owners_each].tolist(), strict=True):
        products.append(rows_of_x[start:end] @ matrix)
        start = end
    return torch.cat([*products, rows_of_x.new_zeros(rows_of_x.shape[0] - start, matrices.shape[2])])
