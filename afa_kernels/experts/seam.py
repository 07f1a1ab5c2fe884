"""The seam of transformers 5 for implementations of an experts module, and what a module needs to go through it.

The forward of an experts class asks ``config._experts_implementation`` for a function. A module with branches gets a
configuration of its own that names ours, so that no other module is concerned; the rest of its configuration stays the
model's.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from afa_kernels import checks

IMPLEMENTATION = "afa_lora"
_NEEDED = "an experts module of transformers 5 (a class under its decorator use_experts_implementation)"


class Branch(NamedTuple):
    """One branch of every expert beside one fused parameter, as a call needs it."""

    lora_a: Tensor  # (E, r, K)
    lora_b: Tensor  # (E, N, r)
    alpha_t: Tensor | None  # None at identity
    activation: str
    scaling: float | Tensor
    dropout_p: float
    save: str
    backend: str | None


class Branches(Protocol):
    """What an experts module keeps as ``afa``."""

    def branches(self, parameter: str) -> list[Branch]:
        """Return the branches that are to be computed beside a parameter of the module."""


class _OwnImplementation:
    """The configuration of the model, but for the implementation of one experts module."""

    _experts_implementation = IMPLEMENTATION

    def __init__(self, config: Any):
        self.of_model = config

    def __getattr__(self, name: str) -> Any:
        if name == "of_model" or name.startswith("__"):  # a copy that is being made has no attributes yet
            raise AttributeError(name)
        return getattr(self.of_model, name)


def why_unsupported(module: nn.Module, parameter: str) -> str | None:
    """Return why ``parameter`` of ``module`` cannot have branches, or None if it can."""
    is_experts = all(hasattr(module, name) for name in ("_apply_gate", "config", "has_gate", "is_transposed"))
    if not is_experts or not hasattr(type(module).forward, "__wrapped__"):
        return f"{type(module).__name__} is not {_NEEDED}"
    if parameter not in projections(module):
        return f"{type(module).__name__} computes with {' and '.join(projections(module))}, got {parameter}"
    weight = getattr(module, parameter)
    if weight.dim() != 3 or weight.dtype not in checks.FLOATING:
        return f"expected a floating-point parameter (experts, .., ..), got {weight.dtype} {tuple(weight.shape)}"
    return None


def projections(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the two fused parameters."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def weight_of(experts: nn.Module, parameter: str) -> Tensor:
    """Return a fused parameter as ``(E, N, K)``."""
    weight = getattr(experts, parameter)
    return weight.transpose(1, 2) if experts.is_transposed else weight


def attach(experts: nn.Module, branches: Branches) -> None:
    """Let ``experts`` compute with ``branches``, which it keeps as ``experts.afa``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from afa_kernels.experts.forward import experts_forward

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    experts.afa = branches
    experts.config = _OwnImplementation(experts.config)


def detach(experts: nn.Module) -> None:
    """Undo :func:`attach`."""
    del experts.afa
    experts.config = experts.config.of_model


def frozen_forward(experts: nn.Module, *args: Any) -> Tensor:
    """Return what the implementation that the model is set to computes."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    eager = type(experts).forward.__wrapped__
    name = experts.config.of_model._experts_implementation
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)(experts, *args)


def local(t: Tensor) -> Tensor:
    """Return the shard of this process of a DTensor, whose gradient is sharded likewise; other tensors as they are."""
    return t.to_local() if hasattr(t, "to_local") else t


def autocast_off(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
