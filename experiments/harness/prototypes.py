"""Blends that the package does not have, in plain torch: are they worth a place in it?

silu and gelu have slope 1/2 at 0, so a branch of small z has half the gain of a LoRA at alpha_t = 1 and all of it at 0.
And where z is small they are nearly linear. The prototypes correct the gain, or let the activation see a larger z:

    phi(z) = (1 - alpha_t) z + alpha_t gain act(scale z) / scale

Two are never annealed: they show what the non-linear branch itself is worth, merging aside.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import afa_kernels as afa
from experiments.harness.adaptation import Method

_ACTIVATIONS = {"relu": functional.relu, "silu": functional.silu, "gelu": functional.gelu}


@dataclass(frozen=True)
class Prototype(Method):
    """An AFA-LoRA of another blend; with ``kept`` alpha_t stays 1, which no merge can follow."""

    gain: float = 1.0
    scale: float = 1.0
    kept: bool = False


PROTOTYPES = {
    "silu_gain": Prototype("silu, slope 1 at 0", "adapters", "silu", gain=2.0),
    "gelu_gain": Prototype("gelu, slope 1 at 0", "adapters", "gelu", gain=2.0),
    "silu_scale": Prototype("silu of 4 z", "adapters", "silu", scale=4.0),
    "silu_both": Prototype("silu of 4 z, slope 1 at 0", "adapters", "silu", gain=2.0, scale=4.0),
    "relu_kept": Prototype("relu, never annealed", "adapters", "relu", kept=True),
    "silu_kept": Prototype("silu, never annealed", "adapters", "silu", kept=True),
}


def blend(z: Tensor, alpha_t: float, activation: str, gain: float = 1.0, scale: float = 1.0) -> Tensor:
    """Return phi(z), of the shape of ``z``."""
    if alpha_t == 0.0:
        return z
    bent = _ACTIVATIONS[activation](scale * z) * (gain / scale)
    return (1.0 - alpha_t) * z + alpha_t * bent


class PrototypeLinear(nn.Module):
    """An AFALinear with another blend; it takes over the layer's frozen base, A and B."""

    def __init__(self, layer: afa.AFALinear, method: Prototype):
        super().__init__()
        self.base_layer = layer.base_layer
        self.lora_a, self.lora_b = layer.lora_a, layer.lora_b
        self.scaling = layer.scaling
        self.method = method
        self.alpha_t = 1.0

    def set_alpha_t(self, value: float) -> None:
        self.alpha_t = 1.0 if self.method.kept else value

    def forward(self, x: Tensor) -> Tensor:
        z = functional.linear(x, self.lora_a)
        h = blend(z, self.alpha_t, self.method.activation, self.method.gain, self.method.scale)
        return self.base_layer(x) + self.scaling * functional.linear(h, self.lora_b)


def use_prototype(model: nn.Module, method: Prototype) -> None:
    """Replace every AFALinear of ``model`` by a :class:`PrototypeLinear`."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, afa.AFALinear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, PrototypeLinear(layer, method))


class InputsOfActivations:
    """Collects z of every AFALinear while it is entered: ``with InputsOfActivations(model) as inputs: model(x)``."""

    def __init__(self, model: nn.Module):
        self._layers = [m for m in model.modules() if isinstance(m, afa.AFALinear)]
        self.z: list[Tensor] = []

    def __enter__(self) -> "InputsOfActivations":
        self._hooks = [layer.register_forward_pre_hook(self._note) for layer in self._layers]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _note(self, layer: afa.AFALinear, inputs: tuple) -> None:
        self.z.append(functional.linear(inputs[0].flatten(0, -2), layer.lora_a))


def share_of_nonlinearity(z: Tensor, activation: str) -> float:
    """Return ``||act(z) - z M|| / ||act(z)||`` with the best linear map M: 0 is what a LoRA can do too.

    ``z`` is ``(rows, r)``; the norms are over all elements.
    """
    z = z.double()
    bent = _ACTIVATIONS[activation](z)
    rest = bent - z @ torch.linalg.lstsq(z, bent).solution
    return (rest.norm() / bent.norm()).item()
