"""The frozen part of a ragged call, ``x @ weight[g].T + bias[g]`` for the rows of each group, and its order with the
branch.

A weight that all groups share is one GEMM. With a weight for each group, a CPU runs one GEMM for each group that has
rows, whose result or sum goes where it belongs; elsewhere torch's ``grouped_mm`` does, which reads the offsets on the
device and cannot accumulate, so that it always comes before the branch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from afa_kernels import torch_private
from afa_kernels.backend import frozen
from afa_kernels.backend.group_loop import runs
from afa_kernels.backend.registry import Backend
from afa_kernels.options import Spec


def forward(
    backend: Backend, spec: Spec, x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None,
    branch: Callable[[Tensor | None, Tensor], object],
) -> tuple[Tensor, object]:  # fmt: skip
    """Return ``y = frozen part + branch`` and what ``branch(base, out)`` returned, which writes ``base + branch`` into
    out; a base may be its out."""
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        (y,), z = frozen.forward(backend, spec, x, [(weight, bias)], lambda bases, outs: branch(bases[0], outs[0]))
        return y, z
    if not x.is_cpu or backend.gemm_first(spec, x.dtype, False):
        y = products(x, offsets, weight, bias)
        return y, branch(y, y)
    y = x.new_empty(x.shape[0], weight.shape[-2])
    if bias is not None:
        _write_bias(y, offsets, bias)
    z = branch(None if bias is None else y, y)
    for group, rows in runs(offsets):
        y[rows].addmm_(x[rows], (weight if weight.dim() == 2 else weight[group]).T)
    return y, z


def backward(
    backend: Backend, spec: Spec, dy: Tensor, offsets: Tensor, weight: Tensor, branch: Callable[[Tensor | None], tuple]
) -> tuple:
    """Return what ``branch`` returned, its first element being ``dx``, with ``dy @ weight[g]`` in it.

    ``branch(dx)`` accumulates its part of dx into ``dx``, or makes a new one from None.
    """
    if weight.dim() == 2:
        return frozen.backward(backend, spec, [(dy, weight)], branch)
    transposed = weight.transpose(1, 2)
    if backend.gemm_first(spec, dy.dtype, True):
        return branch(products(dy, offsets, transposed, None))
    dx, *others = branch(None)
    if dy.is_cpu:
        for group, rows in runs(offsets):
            dx[rows].addmm_(dy[rows], weight[group])
    else:
        dx += products(dy, offsets, transposed, None)
    return dx, *others


def products(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight[g].T + bias[g]`` for the rows of each group; zero on a CPU, undefined elsewhere, for rows
    behind the last offset."""
    n = weight.shape[-2]
    if not x.is_cpu:
        return _on_device(x, offsets, weight, bias)
    y = x.new_empty(x.shape[0], n)
    end = 0
    for group, rows in runs(offsets):
        end = rows.stop
        w = weight if weight.dim() == 2 else weight[group]
        if bias is None:
            torch.mm(x[rows], w.T, out=y[rows])
        else:
            torch.addmm(bias if bias.dim() == 1 else bias[group], x[rows], w.T, out=y[rows])
    y[end:] = 0
    return y


def _write_bias(y: Tensor, offsets: Tensor, bias: Tensor) -> None:
    end = 0
    for group, rows in runs(offsets):
        y[rows] = bias if bias.dim() == 1 else bias[group]
        end = rows.stop
    y[end:] = 0


def _on_device(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.T if weight.dim() == 2 else torch_private.grouped_mm(x, weight.transpose(1, 2), offsets)
    if bias is None:
        return y
    return y.add_(bias if bias.dim() == 1 else bias[group_of_rows(offsets, x.shape[0])])


def group_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Return ``(rows,)`` int64, the group of each row, without waiting for the device; the last one for rows behind the
    last offset."""
    row = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, row, right=True).clamp_(max=offsets.shape[0] - 1)


def outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return ``left.T @ right`` of the rows of each group, ``(G, columns of left, columns of right)``."""
    if not left.is_cpu:
        return torch_private.grouped_mm(left.T, right, offsets)
    sums = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for group, rows in runs(offsets):
        sums[group] = left[rows].T @ right[rows]
    return sums
