"""Layers that share x, as the CUDA backend's group kernels take them, beside the same layers alone and in torch ops."""

import torch
from helpers import eager
from ptx_cuda import kernels

from afa_kernels.backend.interface import Member
from afa_kernels.operator.activation import IDENTITY
from afa_kernels.operator.options import Spec


def held(weight: torch.Tensor, how: str) -> torch.Tensor:
    """Return a float32 weight that lies in memory in another way, between NaN that belong to nobody."""
    weight = weight.float()
    rows, cols = weight.shape
    around = torch.full((rows + 1, cols + 9), torch.nan)
    if how == "rows apart":  # rows of whole vectors
        around = torch.full((rows, (cols + 7) // 4 * 4), torch.nan)
        place = around[:, :cols]
    elif how == "misaligned":
        place = around[1:, 3 : 3 + cols]
    elif how == "transposed":
        place = torch.full((cols, rows + 5), torch.nan)[:, :rows].T
    else:
        assert how == "dense"
        return weight.clone()
    return place.copy_(weight)


class Group:
    """Members with weights of their own dtype and strides, and the gradients of their outputs."""

    def __init__(
        self, m: int, k: int, widths, ranks, dtype=torch.bfloat16, *, float_weights: bool | None = None,
        layouts=("dense", "transposed", "misaligned"),
    ):  # fmt: skip
        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

        self.x = draw(m, k)
        self.members, self.bases, self.dys = [], [], []
        for i, (n, r) in enumerate(zip(widths, ranks, strict=True)):
            a, b = draw(r, k, scale=k**-0.5), draw(n, r, scale=r**-0.5)
            if float_weights or (float_weights is None and i != 1):  # mixed by default
                a, b = held(a, layouts[i]), held(b, layouts[i])
            activation = ("silu", "gelu", IDENTITY)[i]
            alpha_t = None if activation == IDENTITY else torch.tensor((0.3, 0.8)[i])
            self.members.append(Member(a, b, alpha_t, Spec(activation, 1.5 - i, 0)))
            self.bases.append((None, draw(1, n).expand(m, n), draw(m, n))[i])
            self.dys.append(draw(m, n))

    def need(self, what=True) -> list[bool]:
        return [what] * len(self.members)

    def forward(self):
        outs = [torch.full_like(dy, torch.nan) for dy in self.dys]
        zs = kernels.forward_shared(self.x, self.members, bases=self.bases, outs=outs, save_z=True)
        return outs, zs

    def backward(self, zs, *, need_dx=True, need_da=None, need_db=None):
        return kernels.backward_shared(
            self.dys, self.x, self.members, zs, need_dx=need_dx,
            need_da=need_da or self.need(), need_db=need_db or self.need(),
        )  # fmt: skip

    def alone(self, i: int):
        """Return y, z, dx, da and db of member i."""
        member, y = self.members[i], torch.empty_like(self.dys[i])
        a, b, alpha_t, spec = member
        z = kernels.forward(self.x, a, b, alpha_t, None, spec, base=self.bases[i], out=y, save_z=True)
        needs = {"need_dx": True, "need_da": True, "need_db": True}
        return y, z, *kernels.backward(self.dys[i], self.x, a, b, z, alpha_t, None, spec, **needs)

    def plain(self, dtype: torch.dtype):
        """Return every y, dx, every da and every db in torch ops, all in ``dtype``."""
        x = self.x.to(dtype).requires_grad_()
        weights = [
            [w.to(self.x.dtype).to(dtype).contiguous().requires_grad_() for w in (member.a, member.b)]
            for member in self.members
        ]
        ys = []
        for (a, b), (_, _, alpha_t, spec), base in zip(weights, self.members, self.bases, strict=True):
            alpha_t, name = (0.0, "silu") if alpha_t is None else (alpha_t.item(), spec.activation)
            base = None if base is None else base.to(dtype)
            ys.append(eager(x, a, b, alpha_t, activation=name, scaling=spec.scaling, base=base))
        torch.autograd.backward(ys, [dy.to(dtype) for dy in self.dys])
        return [y.detach() for y in ys], [x.grad], [a.grad for a, _ in weights], [b.grad for _, b in weights]
