"""The base layers of the tests of AFALinear, and a layer whose branch is not zero."""

import torch
import torch.nn.functional as F
from torch import nn

import afa_kernels as afa


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, as transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        y = x.reshape(-1, x.shape[-1]) @ self.weight + self.bias
        return y.view(*x.shape[:-1], self.nf)


BASES = {
    "linear": lambda: nn.Linear(12, 10),
    "linear-no-bias": lambda: nn.Linear(12, 10, bias=False),
    "conv1d": lambda: Conv1D(10, 12),
}


def trained(base, **options):
    """Return a layer whose branch is not zero."""
    layer = afa.AFALinear(base, **{"r": 4, **options})
    with torch.no_grad():
        layer.lora_b.normal_(std=0.3)
    return layer


def composed(layer, x, act=F.silu):
    """The layer's function in plain torch, without dropout."""
    z = x @ layer.lora_a.T.to(x.dtype)
    h = (1 - layer.alpha_t) * z + layer.alpha_t * act(z)
    return layer.base_layer(x) + layer.scaling * h @ layer.lora_b.T.to(x.dtype)
