"""Which modules of a model get a branch, and why others do not."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from afa_kernels.layers.base_layer import is_quantized
from afa_kernels.layers.linear import SUPPORTED, why_unsupported

ALL_LINEAR = "all-linear"
_HEAD_NAMES = ("lm_head", "score", "classifier")  # output heads by convention, as in PEFT


class Candidate(NamedTuple):
    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module


def _matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _patterns(argument: str, value: str | Iterable[str]) -> str | tuple[str, ...]:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{argument}: {value!r} is not a regular expression: {error}") from None
        return value
    try:
        names = tuple(value)
    except TypeError:
        raise TypeError(f"{argument}: expected names or a regular expression, got {type(value).__name__}") from None
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{argument}: expected names of modules, got {name!r}")
    return names


def trainable_modules(model: nn.Module, trainable: str | Iterable[str]) -> list[str]:
    patterns = _patterns("trainable", trainable)
    if not patterns:
        return []
    found = [name for name, _ in model.named_modules() if name and _matches(name, patterns)]
    if not found:
        raise ValueError(f"trainable: no module of {type(model).__name__} matches {trainable!r}")
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def find_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    exclude: str | Iterable[str],
    trained: list[str],
) -> list[Candidate]:
    """Return the modules to replace; raise unless there is at least one and all can be."""
    patterns = _patterns("target_modules", target_modules)
    excluded = _patterns("exclude_modules", exclude)
    automatic = isinstance(patterns, str) and patterns.lower() == ALL_LINEAR
    heads = _heads(model) if automatic else set()
    refusal = _Refusal(model)
    targets, left_out = [], {}
    for candidate in _candidates(model):
        name, module = candidate.name, candidate.module
        if excluded and _matches(name, excluded):
            continue
        if any(name == t or name.startswith(f"{t}.") for t in trained):
            continue
        if automatic:
            is_head = any(name == head or name.startswith(f"{head}.") for head in heads)
            if is_head or refusal(candidate) is not None:
                continue
            if why_unsupported(module) is None:
                targets.append(candidate)
            elif is_quantized(module):
                left_out[name] = why_unsupported(module)
        elif _matches(name, patterns):
            unsupported = why_unsupported(module)
            if unsupported is not None:
                raise TypeError(f"target_modules: {name} cannot be adapted: {unsupported}; expected {SUPPORTED}")
            reason = refusal(candidate)
            if reason is not None:
                raise ValueError(f"target_modules: {name} cannot be adapted: {reason}")
            targets.append(candidate)
    if left_out:
        raise ValueError(_leaves_out(left_out, len(targets)))
    if not targets:
        raise ValueError(_nothing_matches(model, target_modules))
    return targets


def _leaves_out(left_out: dict[str, str], adapted: int) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    which = "; ".join(f"{_listed(names)}: {reason}" for reason, names in reasons.items())
    return (
        f"target_modules: 'all-linear' would leave out {len(left_out)} of {len(left_out) + adapted} linear layers. "
        f"{which}. Name the layers to adapt in target_modules, name those to leave out in exclude_modules, or use PEFT "
        "with an AFALoraConfig"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _nothing_matches(model: nn.Module, target_modules: object) -> str:
    supported = [name for name, module in model.named_modules() if name and why_unsupported(module) is None]
    if not supported:
        hint = f"it has no layer that can be adapted ({SUPPORTED})"
        if why_unsupported(model) is None:
            hint = "it is itself a linear layer: use AFALinear(model)"
        return f"target_modules: {type(model).__name__}: {hint}"
    last = dict.fromkeys(name.rpartition(".")[2] for name in supported)
    return (
        f"target_modules: {target_modules!r} matches no layer of {type(model).__name__} that may "
        f"be adapted; it has linear layers called {', '.join(list(last)[:8])}: {supported[0]}, say"
    )


def _candidates(model: nn.Module) -> list[Candidate]:
    """Return every place in the module tree, each once: a module registered at two places comes
    twice."""
    return [
        Candidate(f"{prefix}.{attribute}" if prefix else attribute, parent, attribute, module)
        for prefix, parent in model.named_modules()
        for attribute, module in parent._modules.items()
        if module is not None
    ]


def _heads(model: nn.Module) -> set[str]:
    """Return the names of the output head and what is inside it."""
    heads = {name for name, _ in model.named_modules() if name in _HEAD_NAMES or name.endswith(".lm_head")}
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    output = get_output_embeddings() if callable(get_output_embeddings) else None
    return heads | {name for name, module in model.named_modules() if output is not None and module is output}


class _Refusal:
    """Why a linear layer must not be replaced although its kind is supported."""

    def __init__(self, model: nn.Module):
        self._owners: dict[int, list[str]] = {}
        self._places: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), []).append(name)
        for candidate in _candidates(model):
            self._places.setdefault(id(candidate.module), []).append(candidate.name)

    def __call__(self, candidate: Candidate) -> str | None:
        others = [n for n in self._places[id(candidate.module)] if n != candidate.name]
        if others:
            return f"the same module is also registered as {others[0]}, which would stay as it is"
        weight = candidate.module._parameters.get("weight")
        shared = [n for n in self._owners.get(id(weight), []) if n != candidate.name]
        if shared:
            return (
                f"its weight is tied to that of {shared[0]}, so merging would change that module too; untie them first"
            )
        if isinstance(candidate.parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight and never calls it: no branch would run"
        return None


def check_no_peft(model: nn.Module) -> None:
    """Raise if ``model`` has layers of PEFT, whose parts look like layers to adapt."""
    name = first_layer_of_peft(model)
    if name is not None:
        raise ValueError(
            f"model: {name} is a layer of PEFT; give its adapters an activation with afa_kernels.peft.add_activation, "
            "make them with an AFALoraConfig, or take them out first (merge_and_unload() or unload())"
        )


def first_layer_of_peft(model: nn.Module) -> str | None:
    # By name, because PEFT is not imported for models that do without.
    def is_of_peft(module: nn.Module) -> bool:
        return any(cls.__module__.startswith("peft.tuners.") for cls in type(module).__mro__)

    return next((n for n, m in model.named_modules() if hasattr(m, "base_layer") and is_of_peft(m)), None)
