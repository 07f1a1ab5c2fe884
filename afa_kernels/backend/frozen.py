"""The one place that orders the GEMMs of frozen layers and their branches: whichever comes second accumulates in place.

Branch first: ``y = branch + bias; y.addmm_(x, W.T)``. The GEMM reads its beta = 1 operand behind its products, so y is
passed over once more than by the GEMM alone, where adding the branch afterwards would pass over it twice more. GEMM
first: ``y = x @ W.T + bias; y += branch``, for a backend whose kernels read y for less than the GEMM does
(``Backend.gemm_first``). The same in the backward: ``dx = branch; dx.addmm_(dy, W)``, or the other way round.

A layer alone is a list of one. The layers of a list read the same x, and all their branches are one call.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels.backend.registry import Backend
from afa_kernels.options import Spec


def forward(
    backend: Backend, spec: Spec, x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]],
    branch: Callable[[list[Tensor | None], list[Tensor]], object],
) -> tuple[list[Tensor], object]:  # fmt: skip
    """Return ``y = x @ weight.T + bias + branch`` of each layer ``(weight, bias)``, and what ``branch(bases, outs)``
    returned.

    ``branch(bases, outs)`` writes ``base + branch`` into each out; a base may be its out. ``spec`` is that of the first
    layer: those of one call differ in nothing that the order depends on.
    """
    gemm_first = backend.gemm_first(spec, x.dtype, False)
    ys, bases = [], []
    for weight, bias in layers:
        bias = None if bias is None else bias.to(x.dtype)
        if gemm_first:
            base = y = F.linear(x, weight, bias)
        else:
            y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
            base = None if bias is None else bias.expand_as(y)
        ys.append(y)
        bases.append(base)
    result = branch(bases, ys)
    if not gemm_first:
        for y, (weight, _) in zip(ys, layers, strict=True):
            y.addmm_(x, weight.T)
    return ys, result


def backward(
    backend: Backend, spec: Spec, products: Sequence[tuple[Tensor, Tensor]],
    branch: Callable[[Tensor | None], tuple],
) -> tuple:  # fmt: skip
    """Return what ``branch`` returned, its first element being ``dx``, with each ``dy @ weight`` of ``products`` in it.

    ``branch(dx)`` accumulates its part of dx into ``dx``, or makes a new one from None. The layers go from the last to
    the first, as without a group: the forward read the last weight last, and a small call finds it in the caches.
    """
    products = products[::-1]
    if backend.gemm_first(spec, products[0][0].dtype, True):
        (dy, weight), *others = products
        dx = torch.mm(dy, weight)
        for dy, weight in others:
            dx.addmm_(dy, weight)
        return branch(dx)
    dx, *others = branch(None)
    for dy, weight in products:
        dx.addmm_(dy, weight)
    return dx, *others
