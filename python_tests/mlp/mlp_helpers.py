"""An MLP as the common models write it, adapted, and what a step of it gives, for the tests of the MLP block."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft_models import fill_adapters
from torch import Tensor, nn

import afa_kernels as afa
from afa_kernels.model import mlp as blocks

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
K, INNER = 24, 40


class MLP(nn.Module):
    """``w2(act(w1(x)) * w3(x))``, whose w1 and w3 share x as its parts, too."""

    def __init__(self, k=K, inner=INNER, dtype=torch.float32, activation="silu", bias=True):
        super().__init__()
        sizes = (k, inner), (k, inner), (inner, k)
        self.w1, self.w3, self.w2 = (nn.Linear(*size, bias, dtype=dtype) for size in sizes)
        self.activation = activation

    def forward(self, x):
        return self.w2(ACTIVATIONS[self.activation](self.w1(x)) * self.w3(x))


@pytest.fixture
def fused(monkeypatch):
    """Has the activation of each call that computed a whole block."""
    calls, original = [], blocks.mlp
    monkeypatch.setattr(blocks, "mlp", lambda *of: calls.append(of[2]) or original(*of))
    monkeypatch.setattr(blocks, "_told", {blocks.MERGED})
    return calls


def pair(*sizes, alpha_t=0.5, net=MLP, options=(), **of_net) -> tuple[nn.Module, nn.Module]:
    """Return the same adapted MLP as its parts and as a block."""
    torch.manual_seed(0)
    parts = nn.Sequential(net(*sizes, **of_net))
    models = copy.deepcopy(parts), parts
    for model, fuse_mlp in zip(models, (False, True), strict=True):
        afa.inject(model, **{"r": 4, **dict(options)}, fuse_mlp=fuse_mlp)
        afa.set_alpha_t(fill_adapters(model), alpha_t)
    return models


def step(model: nn.Module, x: Tensor, dy: Tensor | None = None, call=None) -> dict[str, Tensor]:
    """Return the output, dx and the gradient of each trained parameter."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = (call or model)(x)
    y.backward(torch.cos(torch.arange(y.numel())).view(y.shape).to(y.dtype) if dy is None else dy)
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | named


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Fail unless all bits are equal."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(value, want[name]), name
