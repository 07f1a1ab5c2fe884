"""The fused parameters of an experts module of transformers 5.

Which of them get branches, what is computed beside them, and what PEFT's checkpoints call them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from afa_kernels.layers.base_layer import is_dense
from afa_kernels.layers.branch import AdapterCall
from afa_kernels.layers.mixed import Assignment

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


# --- which parameters of a model are meant


class Target(NamedTuple):
    name: str
    experts: nn.Module
    parameter: str


def find_parameters(model: nn.Module, target_parameters: Iterable[str], trained: list[str] = ()) -> list[Target]:
    """Return the parameters that are called as one of ``target_parameters`` or end in ``"." + name``, in the order in
    which their modules define them.

    Raises:
        TypeError: a named parameter cannot have branches.
        ValueError: a name matches nothing.
    """
    names = _names(target_parameters)
    targets, found = [], set()
    for prefix, module in model.named_modules():
        if any(prefix == t or prefix.startswith(f"{t}.") for t in trained):
            continue
        for parameter, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{parameter}" if prefix else parameter
            matching = {n for n in names if name == n or name.endswith(f".{n}")}
            if not matching:
                continue
            reason = why_unsupported(module, parameter)
            if reason is not None:
                raise TypeError(f"target_parameters: {name} cannot be adapted: {reason}")
            found |= matching
            targets.append(Target(name, module, parameter))
    missing = [n for n in names if n not in found]
    if missing:
        raise ValueError(
            f"target_parameters: {missing[0]!r} matches no parameter of {type(model).__name__}; {_hint(model)}"
        )
    return targets


def _names(target_parameters: Iterable[str]) -> tuple[str, ...]:
    if isinstance(target_parameters, str):
        raise TypeError(f"target_parameters: expected a list of names, got the string {target_parameters!r}")
    names = tuple(target_parameters)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"target_parameters: expected names of parameters, got {name!r}")
    return names


def _hint(model: nn.Module) -> str:
    fused = (
        f"{prefix}.{parameter}"
        for prefix, module in model.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
        if why_unsupported(module, parameter) is None
    )
    first = next(fused, None)
    return "it has no fused experts" if first is None else f"it has {first}, say"


# --- PEFT's checkpoints
#
# PEFT wraps an experts module once for each targeted parameter, the one that the module defines first innermost. A name
# in a checkpoint tells the depth of the wrapper and not the parameter. Each wrapper has one A, ``(E * r, K)`` with the
# rows of an expert together, and one B, ``(N, r * E)`` with the columns of a rank index together.


def names_in_peft(model: nn.Module, parameters: Iterable[str]) -> dict[str, str]:
    """Return what PEFT calls each of ``parameters``, names of fused parameters of ``model``."""
    wanted: dict[str, list[str]] = {}
    for name in parameters:
        prefix, _, parameter = name.rpartition(".")
        wanted.setdefault(prefix, []).append(parameter)
    names = {}
    for prefix, targeted in wanted.items():
        defined = [name for name, _ in model.get_submodule(prefix).named_parameters(recurse=False) if name in targeted]
        for depth, parameter in enumerate(reversed(defined)):
            names[f"{prefix}.{parameter}"] = prefix + ".base_layer" * depth
    return names


def as_matrices(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of all experts as PEFT keeps them."""
    return lora_a.flatten(0, 1), lora_b.permute(1, 2, 0).flatten(1)


def from_matrices(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`as_matrices`, as views."""
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
