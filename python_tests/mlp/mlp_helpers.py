"""An MLP as the common models write it, adapted, and what a step of it gives, for the tests of the MLP block."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import afa_kernels as afa

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
K, INNER = 24, 40


class MLP(nn.Module):
    """``w2(act(w1(x)) * w3(x))``, whose w1 and w3 share x as its parts, too."""

    def __init__(self, k=K, inner=INNER, dtype=torch.float32, activation="silu", bias=True):
        super().__init__()
        self.w1, self.w3, self.w2 = (
            nn.Linear(*sizes, bias, dtype=dtype) for sizes in ((k, inner), (k, inner), (inner, k))
        )
        self.activation = activation

    def forward(self, x):
        return self.w2(ACTIVATIONS[self.activation](self.w1(x)) * self.w3(x))


def filled(model: nn.Module) -> nn.Module:
    """Draw every adapter anew: with B = 0 any branch is right."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return model


def pair(*sizes, alpha_t=0.5, net=MLP, r=4, share_inputs=None, backend=None, dropout=0.0, **options):
    """Return the same adapted MLP as its parts and as a block."""
    torch.manual_seed(0)
    parts = nn.Sequential(net(*sizes, **options))
    block = copy.deepcopy(parts)
    afa.inject(parts, r=r, share_inputs=share_inputs, backend=backend, dropout=dropout)
    afa.inject(block, r=r, share_inputs=share_inputs, backend=backend, dropout=dropout, fuse_mlp=True)
    for model in (parts, block):
        afa.set_alpha_t(filled(model), alpha_t)
    return parts, block


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
        assert torch.equal(value, want[name]), name


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that the forward keeps for the backward beside the parameters, each memory once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for t in kept.values())
