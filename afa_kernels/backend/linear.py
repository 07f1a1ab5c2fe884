"""A frozen linear layer with its branch: the branch writes first, then torch's GEMM accumulates
into it in place.

``y_init = branch + bias; y.addmm_(x, W.T)`` passes over y once more than the GEMM alone, where
adding the branch afterwards would pass over it twice more; the GEMM reads its beta = 1 operand
behind its products. The same in the backward: ``dx = dz @ a; dx.addmm_(dy, W)``.
"""

import torch
from torch import Tensor

from afa_kernels.backend.registry import Backend, Spec


def linear_forward(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    alpha_t: Tensor,
    seed: Tensor | None,
    spec: Spec,
    *,
    save_z: bool,
) -> tuple[Tensor, Tensor | None]:
    if backend.linear_forward is not None:
        return backend.linear_forward(x, weight, bias, a, b, alpha_t, seed, spec, save_z=save_z)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    base = None if bias is None else bias.to(x.dtype).expand_as(y)
    z = backend.forward(x, a, b, alpha_t, seed, spec, base=base, out=y, save_z=save_z)
    return y.addmm_(x, weight.T), z


def linear_backward(
    backend: Backend,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    z: Tensor | None,
    alpha_t: Tensor,
    seed: Tensor | None,
    spec: Spec,
    *,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if backend.linear_backward is not None:
        return backend.linear_backward(dy, x, weight, a, b, z, alpha_t, seed, spec, need_da=need_da, need_db=need_db)
    dx, da, db = backend.backward(dy, x, a, b, z, alpha_t, seed, spec, need_dx=True, need_da=need_da, need_db=need_db)
    return dx.addmm_(dy, weight), da, db
