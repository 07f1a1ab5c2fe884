"""Small networks for the tests of the PEFT integration."""

import copy
import re

import torch
from torch import Tensor, nn

TARGETS = ("q_proj", "v_proj")


class Net(nn.Module):
    """Two linear layers, one of them without bias, and a head."""

    def __init__(self, dtype=torch.float32, widths=(16, 24, 12)):
        super().__init__()
        self.q_proj = nn.Linear(*widths[:2], dtype=dtype)
        self.v_proj = nn.Linear(*widths[1:], bias=False, dtype=dtype)
        self.head = nn.Linear(widths[2], 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.v_proj(torch.tanh(self.q_proj(x)))))


def fill_adapters(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every adapter weight anew: with B = 0 any branch is right."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = parameter.shape[-1] ** -0.5
            values = torch.randn(parameter.shape, generator=generator) * scale
            with torch.no_grad():
                parameter.copy_(values)
    return model


def adapted(net: nn.Module, config, seed: int = 0) -> nn.Module:
    """Return a copy of ``net`` with a filled adapter."""
    from peft import get_peft_model

    return fill_adapters(get_peft_model(copy.deepcopy(net), config), seed)


def gradients(model: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Return the output, dx and the gradient of every trained parameter."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.ones_like(y) if dy is None else dy)
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | named


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare what :func:`gradients` returned of two models that differ in the order of sums only:
    each tensor against its own largest value. ``wanted`` may have its layer inside a Branch."""
    wanted = {re.sub(r"(^|\.)layer\.", r"\1", name): value for name, value in wanted.items()}
    assert got.keys() == wanted.keys(), (sorted(got), sorted(wanted))
    for name, value in got.items():
        other = wanted[name]
        assert value.shape == other.shape and value.dtype == other.dtype, name
        if value.numel():
            allowed = 200 * torch.finfo(other.dtype).eps * other.abs().max().item()
            error = (value - other).abs().max().item()
            assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
