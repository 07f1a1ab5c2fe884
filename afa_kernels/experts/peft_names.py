"""Experts in PEFT's LoRA checkpoint: its names and the shapes of its matrices.

PEFT wraps an experts module once for each targeted parameter, the one that the module defines first innermost. A name
in a checkpoint tells the depth of the wrapper and not the parameter. Each wrapper has one A,
``(E * r, K)`` with the rows of an expert together, and one B, ``(N, r * E)`` with the columns of a rank index together.
"""

from collections.abc import Iterable

from torch import Tensor, nn


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
