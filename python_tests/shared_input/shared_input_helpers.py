"""Layers on one x, and a block that calls them one by one, for the tests of shared input."""

import torch
from torch import nn

import afa_kernels as afa

K = 24
# (out_features, r, lora_alpha, activation, alpha_t): everything that may differ between members
MEMBERS = ((32, 4, 8, "silu", 0.7), (16, 3, 3, "gelu", 0.3), (24, 8, 4, "relu", 0.0))


def layer(n, r=4, lora_alpha=8, activation="silu", alpha_t=0.7, dtype=torch.float32, **options):
    made = afa.AFALinear(nn.Linear(K, n, dtype=dtype), r, lora_alpha, activation, **options)
    nn.init.normal_(made.lora_b, std=r**-0.5)
    made.set_alpha_t(alpha_t)
    return made


def members(dtype=torch.float32, **options) -> list[afa.AFALinear]:
    return [layer(*row, dtype=dtype, **options) for row in MEMBERS]


class Block(nn.Module):
    """A block that calls its projections one by one, as attention code does."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = members(dtype, **options)

    def forward(self, x, between=None, context=None):
        q = self.q_proj(x)
        if between is not None:
            between(x)
        other = x if context is None else context
        return q, self.k_proj(other), self.v_proj(other)


def run(function, layers, x, dys, alone=()):
    x = x.detach().clone().requires_grad_()
    for member in layers:
        member.zero_grad()
    ys = function(x)
    torch.autograd.backward([y for i, y in enumerate(ys) if i not in alone],
                            [dy for i, dy in enumerate(dys) if i not in alone])  # fmt: skip
    grads = {"dx": x.grad}
    for i, member in enumerate(layers):
        grads |= {f"da{i}": member.lora_a.grad, f"db{i}": member.lora_b.grad}
    return {f"y{i}": y.detach() for i, y in enumerate(ys)}, grads


def separate(layers):
    return lambda x: [member(x) for member in layers]
