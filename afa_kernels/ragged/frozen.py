"""The frozen part of a ragged call, ``x @ weight[g].T + bias[g]`` for the rows of each group, and its order with the
branch.

A group is here what has a matrix of its own, which may be several groups of the branch in a row. A weight that all
groups share is one GEMM. With a weight for each group, torch's ``grouped_mm`` multiplies on a GPU, where it reads the
offsets on the device; it cannot accumulate, so that it always comes before the branch, which adds to y and to dx. On a
CPU it is a loop of GEMMs, which is here instead, for a GPU of a torch without it too: its results go where they belong,
or are added to what is there. Two kinds of call have something faster; :func:`way_of` names them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from afa_kernels import torch_private
from afa_kernels.backend import frozen
from afa_kernels.backend.group_loop import runs
from afa_kernels.backend.registry import Backend
from afa_kernels.backend.torch_ragged import group_of_rows
from afa_kernels.options import Spec


class Way(NamedTuple):
    """How the rows of all groups are multiplied, and why."""

    name: str
    reason: str


SHARED = Way("gemm", "all groups share the weight")
GROUPED = Way("grouped_mm", "it reads the offsets on the device")
EQUAL = Way("bmm", "groups of equally many rows are a batch, whose products run side by side")
LOOP = Way("loop", "a GEMM on all threads for each group that has rows")
WIDE = Way("float32 loop", "this torch has no fast product of such a weight in this dtype on this CPU")


def ends_of(offsets: Tensor, weights: int) -> Tensor:
    """Return where the rows of each of so many matrices end, from where those of each group of a call do."""
    if weights == offsets.shape[0]:
        return offsets
    groups = offsets.shape[0] // weights
    return offsets[groups - 1 :: groups].contiguous()


def way_of(rows: Tensor, offsets: Tensor, matrices: Tensor) -> Way:
    """Return how ``rows @ matrices[g]`` is computed.

    Measured on 2 cores of a Zen 4, 64 matrices of 1024 x 1024, 2048 rows, against ``grouped_mm``: LOOP within 2% of it
    in float32, and 5% faster in bfloat16, wherever the rows lie. EQUAL takes 0.6 times as long in float32 and 0.8 times
    in bfloat16: a GEMM of 32 rows has too little work for two threads, but two GEMMs have not. WIDE takes 0.025 times
    as long as what torch does in bfloat16 under AVX2 (119 ms for 4.9 s), and in float16 without AVX512-FP16.
    """
    if matrices.dim() == 2:
        return SHARED
    if _on_device(rows):
        return GROUPED
    if rows.is_cpu and matrices.stride(2) == 1 and not torch_private.has_fast_gemm(rows.dtype):
        return WIDE
    return EQUAL if _are_equal(offsets.tolist(), rows.shape[0]) else LOOP


def _on_device(t: Tensor) -> bool:
    """Whether torch reads the offsets itself."""
    return not t.is_cpu and torch_private.has_grouped_mm()


def _are_equal(ends: list[int], rows: int) -> bool:
    """Whether the groups that end there have all rows, equally many each."""
    each = ends[0]
    return each > 0 and ends == list(range(each, rows + 1, each))


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
    matrices = weight.mT
    if weight.dim() == 3:
        offsets = ends_of(offsets, weight.shape[0])
    if _on_device(x):
        y = _grouped(x, offsets, matrices, bias)
        return y, branch(y, y)
    y = x.new_empty(x.shape[0], weight.shape[-2])
    if bias is not None:
        _write_bias(y, offsets, bias)
    if backend.gemm_first(spec, x.dtype, False):
        _multiply(x, offsets, matrices, y, accumulate=bias is not None)
        return y, branch(y, y)
    z = branch(None if bias is None else y, y)
    _multiply(x, offsets, matrices, y, accumulate=True)
    return y, z


def backward(
    backend: Backend, spec: Spec, dy: Tensor, offsets: Tensor, weight: Tensor, branch: Callable[[Tensor | None], tuple]
) -> tuple:
    """Return what ``branch`` returned, its first element being ``dx``, with ``dy @ weight[g]`` in it.

    ``branch(dx)`` accumulates its part of dx into ``dx``, or makes a new one from None.
    """
    if weight.dim() == 2:
        return frozen.backward(backend, spec, [(dy, weight)], branch)
    offsets = ends_of(offsets, weight.shape[0])
    if _on_device(dy):
        return branch(_grouped(dy, offsets, weight, None))
    if backend.gemm_first(spec, dy.dtype, True):
        dx = dy.new_empty(dy.shape[0], weight.shape[2])
        _multiply(dy, offsets, weight, dx, accumulate=False)
        return branch(dx)
    dx, *others = branch(None)
    _multiply(dy, offsets, weight, dx, accumulate=True)
    return dx, *others


def _multiply(rows: Tensor, offsets: Tensor, matrices: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """Write ``rows @ matrices[g]`` into out, or add it; for rows behind the last offset that is zero where each group
    has a matrix."""
    way = way_of(rows, offsets, matrices)
    beta = 1 if accumulate else 0
    if way is SHARED:
        out.addmm_(rows, matrices, beta=beta)
        return
    if way is EQUAL:
        batch = (offsets.shape[0], -1)
        out.unflatten(0, batch).baddbmm_(rows.unflatten(0, batch), matrices, beta=beta)
        return
    for own, some, matrix in _pieces(rows, offsets, matrices, out):
        if way is LOOP:
            own.addmm_(some, matrix, beta=beta)
        elif accumulate:
            own.add_(some.float() @ matrix.float())
        else:
            own.copy_(some.float() @ matrix.float())
    if not accumulate:
        out[int(offsets[-1]) :] = 0


def _pieces(rows: Tensor, offsets: Tensor, matrices: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (its rows of out, its rows, its matrix) of each group that has rows. Views are made in bulk: one by one
    they took 1% of the products."""
    ends = offsets.tolist()
    sizes = [end - start for start, end in zip([0, *ends], [*ends, rows.shape[0]], strict=True)]
    pieces = zip(out.split(sizes), rows.split(sizes), matrices.unbind(), strict=False)  # without the rows behind
    return (piece for piece, size in zip(pieces, sizes, strict=False) if size)


def _write_bias(y: Tensor, offsets: Tensor, bias: Tensor) -> None:
    end = 0
    for group, rows in runs(offsets):
        y[rows] = bias if bias.dim() == 1 else bias[group]
        end = rows.stop
    y[end:] = 0


def _grouped(rows: Tensor, offsets: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``rows @ matrices[g] + bias[g]``; undefined for rows behind the last offset."""
    if way_of(rows, offsets, matrices) is SHARED:
        y = rows @ matrices
    else:
        y = torch_private.grouped_mm(rows, matrices, offsets)
    if bias is None:
        return y
    return y.add_(bias if bias.dim() == 1 else bias[group_of_rows(offsets, rows.shape[0])])


def outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return ``left.T @ right`` of the rows of each group, ``(G, columns of left, columns of right)``."""
    if _on_device(left) and left.shape[0]:
        return torch_private.grouped_mm(left.T, right, offsets)
    sums = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for group, rows in runs(offsets) if left.shape[0] else ():
        sums[group] = left[rows].T @ right[rows]
    return sums
