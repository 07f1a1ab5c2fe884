"""The frozen part of a call, ``x @ W.T + bias``, and its order with the branch: whichever comes second accumulates.

Branch first: ``y = branch + bias; y.addmm_(x, W.T)``. The GEMM reads its beta = 1 operand behind its products, so y is
passed over once more than by the GEMM alone, where adding the branch afterwards would pass over it twice more. GEMM
first: ``y = x @ W.T + bias; y += branch``, for a backend whose kernels read y for less than the GEMM does
(``Backend.gemm_first``). The same in the backward: ``dx = branch; dx.addmm_(dy, W)``, or the other way round. Whoever
calls :func:`begin` runs the branch next, and then :func:`finish` where the product is still to come.

Rows may have owners with a matrix each, several owners of the branch in a row one together. torch's ``grouped_mm``
multiplies them on a GPU, where it reads the offsets on the device; it cannot accumulate, so that it always comes first.
On a CPU, in float64, and for a torch without it, it is a loop of GEMMs, whose results go where they belong.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import torch_private
from afa_kernels.backend.interface import Backend, Rows
from afa_kernels.backend.torch import owner_of_rows
from afa_kernels.operator.options import Spec
from afa_kernels.operator.quantized_weight import QuantizedWeight, dense


def begin(
    backend: Backend, spec: Spec, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor | None, bool]:  # fmt: skip
    """Return y, the base that the branch is added to in it (y itself, another tensor, or None for zero), and whether
    the product is still to come, by :func:`finish`."""
    bias = None if bias is None else bias.to(x.dtype)
    if rows is not None and (weight.dim() == 3 or (bias is not None and bias.dim() == 2)):
        return _begin_by_owner(backend, spec, x, weight, bias, rows.offsets)
    if backend.gemm_first(spec, x.dtype, False):
        y = F.linear(x, dense(weight, x.dtype), bias)
        return y, y, False
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    return y, None if bias is None else bias.expand_as(y), True


def finish(y: Tensor, x: Tensor, weight: Tensor | QuantizedWeight, rows: Rows | None = None) -> None:
    """Add the product to y."""
    if weight.dim() == 2:
        y.addmm_(x, dense(weight, x.dtype).T)
    else:
        _multiply(x, ends_of(rows.offsets, weight.shape[0]), weight.mT, y, accumulate=True)


def begin_backward(
    backend: Backend, spec: Spec, dy: Tensor, weight: Tensor | QuantizedWeight, rows: Rows | None = None
) -> Tensor | None:
    """Return the product's part of dx, to which the branch is added; None: the branch comes first, and
    :func:`finish_backward` then."""
    gemm_first = backend.gemm_first(spec, dy.dtype, True)
    if weight.dim() == 2:
        return torch.mm(dy, dense(weight, dy.dtype)) if gemm_first else None
    offsets = ends_of(rows.offsets, weight.shape[0])
    if _on_device(dy):
        return _product_by_owner(dy, offsets, weight, None)
    if not gemm_first:
        return None
    dx = dy.new_empty(dy.shape[0], weight.shape[2])
    _multiply(dy, offsets, weight, dx, accumulate=False)
    return dx


def finish_backward(dx: Tensor, dy: Tensor, weight: Tensor | QuantizedWeight, rows: Rows | None = None) -> None:
    """Add the product's part to dx."""
    if weight.dim() == 2:
        dx.addmm_(dy, dense(weight, dy.dtype))
    else:
        _multiply(dy, ends_of(rows.offsets, weight.shape[0]), weight, dx, accumulate=True)


# --- a matrix for each owner


class Way(NamedTuple):
    """How the rows of all owners are multiplied, and why."""

    name: str
    reason: str


SHARED = Way("gemm", "all owners share the weight")
GROUPED = Way("grouped_mm", "it reads the offsets on the device")
LOOP = Way("loop", "a GEMM on all threads for each owner that has rows")
WIDE = Way("float32 loop", "this torch has no fast product of such a weight in this dtype on this CPU")


def ends_of(offsets: Tensor, weights: int) -> Tensor:
    """Return where the rows of each of so many matrices end, from where those of each owner of a call do."""
    if weights == offsets.shape[0]:
        return offsets
    owners = offsets.shape[0] // weights
    return offsets[owners - 1 :: owners].contiguous()


def way_of(rows: Tensor, matrices: Tensor) -> Way:
    """Return how ``rows @ matrices[g]`` is computed.

    Measured on 2 cores of a Zen 4, 64 matrices of 1024 x 1024, 2048 rows, against ``grouped_mm``: LOOP within 2% of it
    in float32, and 5% faster in bfloat16, wherever the rows lie. WIDE takes 0.025 times as long as what torch does in
    bfloat16 under AVX2 (119 ms for 4.9 s), and in float16 without AVX512-FP16.
    """
    if matrices.dim() == 2:
        return SHARED
    if _on_device(rows):
        return GROUPED
    if rows.is_cpu and matrices.stride(2) == 1 and not torch_private.has_fast_gemm(rows.dtype):
        return WIDE
    return LOOP


def _on_device(t: Tensor) -> bool:
    """Whether torch reads the offsets itself."""
    return not t.is_cpu and torch_private.has_grouped_mm(t.dtype)


def _begin_by_owner(
    backend: Backend, spec: Spec, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor | None, bool]:
    matrices = weight.mT
    if weight.dim() == 3:
        offsets = ends_of(offsets, weight.shape[0])
    if _on_device(x):
        y = _product_by_owner(x, offsets, matrices, bias)
        return y, y, False
    y = x.new_empty(x.shape[0], weight.shape[-2])
    if bias is not None:
        _write_bias(y, offsets, bias)
    if backend.gemm_first(spec, x.dtype, False):
        _multiply(x, offsets, matrices, y, accumulate=bias is not None)
        return y, y, False
    return y, None if bias is None else y, True


def _multiply(rows: Tensor, offsets: Tensor, matrices: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """Write ``rows @ matrices[g]`` into out, or add it; for rows behind the last offset that is zero where each owner
    has a matrix."""
    way = way_of(rows, matrices)
    beta = 1 if accumulate else 0
    if way is SHARED:
        out.addmm_(rows, matrices, beta=beta)
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
    """Yield (its rows of out, its rows, its matrix) of each owner that has rows. Views are made in bulk: one by one
    they took 1% of the products."""
    ends = offsets.tolist()
    sizes = [end - start for start, end in zip([0, *ends], [*ends, rows.shape[0]], strict=True)]
    pieces = zip(out.split(sizes), rows.split(sizes), matrices.unbind(), strict=False)  # without the rows behind
    return (piece for piece, size in zip(pieces, sizes, strict=False) if size)


def _runs(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (owner, its rows) for each that has rows."""
    start = 0
    for owner, end in enumerate(offsets.tolist()):
        if end > start:
            yield owner, slice(start, end)
        start = end


def _write_bias(y: Tensor, offsets: Tensor, bias: Tensor) -> None:
    end = 0
    for owner, rows in _runs(offsets):
        y[rows] = bias if bias.dim() == 1 else bias[owner]
        end = rows.stop
    y[end:] = 0


def _product_by_owner(rows: Tensor, offsets: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``rows @ matrices[g] + bias[g]``; undefined for rows behind the last offset."""
    if way_of(rows, matrices) is SHARED:
        y = rows @ matrices
    else:
        y = torch_private.grouped_mm(rows, matrices, offsets)
    if bias is None:
        return y
    return y.add_(bias if bias.dim() == 1 else bias[owner_of_rows(offsets, rows.shape[0])])


def outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return ``left.T @ right`` of the rows of each owner, ``(G, columns of left, columns of right)``."""
    if _on_device(left) and left.shape[0]:
        return torch_private.grouped_mm(left.T, right, offsets)
    sums = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for owner, rows in _runs(offsets) if left.shape[0] else ():
        sums[owner] = left[rows].T @ right[rows]
    return sums
