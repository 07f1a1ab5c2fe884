"""The one place that orders the GEMM of a frozen layer and the branch: whichever comes second accumulates in place.

Branch first: ``y = branch + bias; y.addmm_(x, W.T)``. The GEMM reads its beta = 1 operand behind its products, so y is
passed over once more than by the GEMM alone, where adding the branch afterwards would pass over it twice more. GEMM
first: ``y = x @ W.T + bias; y += branch``, for a backend whose kernels read y for less than the GEMM does
(``Backend.gemm_first``). The same in the backward: ``dx = branch; dx.addmm_(dy, W)``, or the other way round.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels.backend.registry import Backend
from afa_kernels.options import Spec


def forward(
    backend: Backend, spec: Spec, x: Tensor, weight: Tensor, bias: Tensor | None,
    branch: Callable[[Tensor | None, Tensor], Tensor | None],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return ``y = x @ weight.T + bias + branch``, and what ``branch(base, out)`` returned.

    ``branch(base, out)`` writes ``base + branch`` into ``out``; base may be out.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if backend.gemm_first(spec, x.dtype, False):
        y = F.linear(x, weight, bias)
        return y, branch(y, y)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    z = branch(None if bias is None else bias.expand_as(y), y)
    return y.addmm_(x, weight.T), z


def backward(
    backend: Backend, spec: Spec, products: Iterable[tuple[Tensor, Tensor]],
    branch: Callable[[Tensor | None], tuple],
) -> tuple:  # fmt: skip
    """Return what ``branch`` returned, its first element being ``dx``, with each ``dy @ weight`` of ``products`` in it.

    ``branch(dx)`` accumulates its part of dx into ``dx``, or makes a new one from None.
    """
    products = list(products)
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
