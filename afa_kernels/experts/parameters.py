"""The fused parameters of an experts module of transformers 5, and what is computed beside them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from afa_kernels.base_layer import is_dense
from afa_kernels.mixed import AdapterCall, Assignment

_NEEDED = "an experts module of transformers 5 (a class under its decorator use_experts_implementation)"


class Branches(Protocol):
    """What an experts module keeps as ``afa``."""

    def assignment(self) -> Assignment | None:
        """Return which adapter computes which token, or None if all branches compute all tokens."""

    def calls(self, parameter: str) -> list[Sequence[AdapterCall | None]]:
        """Return what is to be computed beside a parameter of the module: with an assignment, in one element, the call
        of each of its adapters, None where that has no branch here; else an element with one call for each branch."""


def why_unsupported(module: nn.Module, parameter: str) -> str | None:
    """Return why ``parameter`` of ``module`` cannot have branches, or None if it can."""
    is_experts = all(hasattr(module, name) for name in ("_apply_gate", "config", "has_gate", "is_transposed"))
    if not is_experts or not hasattr(type(module).forward, "__wrapped__"):
        return f"{type(module).__name__} is not {_NEEDED}"
    if parameter not in projections(module):
        return f"{type(module).__name__} computes with {' and '.join(projections(module))}, got {parameter}"
    weight = getattr(module, parameter)
    if weight.dim() != 3 or not is_dense(weight):
        got = f"{type(weight).__name__} of {weight.dtype} {tuple(weight.shape)}"
        return f"expected a floating-point parameter (experts, .., ..), got a {got}"
    return None


def projections(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the two fused parameters."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def weight_of(experts: nn.Module, parameter: str) -> Tensor:
    """Return a fused parameter as ``(E, N, K)``."""
    weight = getattr(experts, parameter)
    return weight.transpose(1, 2) if experts.is_transposed else weight


def local(t: Tensor) -> Tensor:
    """Return the shard of this process of a DTensor, whose gradient is sharded likewise; other tensors as they are."""
    return t.to_local() if hasattr(t, "to_local") else t
