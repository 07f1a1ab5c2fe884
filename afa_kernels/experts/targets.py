"""Which fused expert parameters of a model get branches."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from afa_kernels.experts.parameters import why_unsupported


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
