"""A stack of adapters, each of which computes its own samples of a batch; AFALinearStack: beside a linear layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from afa_kernels.alpha_t import normal
from afa_kernels.layers.base_layer import LikeItsBase, check_gives_gradient, is_conv1d, plain_weight
from afa_kernels.layers.branch import AdapterCall, Branch, BranchOptions
from afa_kernels.layers.linear import SUPPORTED, why_unsupported
from afa_kernels.layers.mixed import BASE, Assignment, mixed_linear, mixed_lora, recomputed_within
from afa_kernels.layers.quantized import weight_like
from afa_kernels.operator import checks


class AdapterStack(nn.Module):
    """Base of what has several adapters: :class:`AFALinearStack` and :class:`afa_kernels.AFAExpertStack`.

    ``adapters[name]`` has ``lora_a``, ``lora_b``, ``alpha_t`` and the options of one adapter. A subclass has
    :meth:`_branch` and fills the stack.
    """

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self._assignment: Assignment | None = None  # set by adapters_of

    def add_adapter(self, name: str, **options: Any) -> None:
        """Add an adapter; ``options`` as in :class:`afa_kernels.AFALinear`."""
        check_name(name)
        if name in self.adapters:
            raise ValueError(f"name: there is an adapter {name!r} already")
        self.adapters[name] = self._branch(BranchOptions(**options)).train(self.training)

    def delete_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise ValueError(f"name: expected one of {', '.join(self.adapters) or 'no adapter'}, got {name!r}")
        del self.adapters[name]

    @property
    def merged(self) -> bool:
        """No weight equals several branches, so a stack is never merged."""
        return False

    @property
    def alpha_t(self) -> float:
        """The largest blend coefficient of the adapters."""
        return max((branch.alpha_t for branch in self.adapters.values()), default=0.0)

    def annealed(self, adapter: str | None = None) -> dict[str, Branch]:
        """Return its adapters by their names, or the one of that name if there is one."""
        return {name: branch for name, branch in self.adapters.items() if adapter in (None, name)}

    def set_alpha_t(self, value: float, adapter: str | None = None) -> None:
        """Set the blend coefficient of one adapter, or of all, in [0, 1].

        Raises:
            TypeError, ValueError: ``value`` is no number in [0, 1], or there is no such adapter.
        """
        value = normal(checks.alpha_value(value))
        if adapter is not None and adapter not in self.adapters:
            raise ValueError(f"adapter: expected one of {', '.join(self.adapters)}, got {adapter!r}")
        for branch in self.adapters.values() if adapter is None else [self.adapters[adapter]]:
            branch.write_alpha_t(value)

    def assignment(self) -> Assignment:
        """Return which adapter computes which sample.

        Raises:
            ValueError: nobody said it.
        """
        if self._assignment is None:
            raise ValueError(
                f"names: which of the adapters {', '.join(self.adapters)} computes which sample is not said; call the "
                "model inside `with afa_kernels.adapters_of(model, names)`, and its backward too where the model "
                "recomputes activations by itself"
            )
        return self._assignment

    def calls_of(self, assignment: Assignment) -> list[AdapterCall | None]:
        """Return the call of each of its adapters; None for ``"__base__"`` and for one that only other layers have."""
        return [self.adapters[name].call() if name in self.adapters else None for name in assignment.adapters]

    def _branch(self, options: BranchOptions) -> Branch:
        """Return a new adapter."""
        raise NotImplementedError


class AFALinearStack(LikeItsBase, AdapterStack):
    """A frozen linear layer with a stack of AFA-LoRA adapters.

    Each adapter has its own rank, scaling, activation, dropout and alpha_t. :func:`afa_kernels.adapters_of` says which
    adapter computes which sample; the layer then computes the frozen part and all branches in one call. An adapter that
    computes no sample gets no gradient: ``grad`` stays None.

    Args:
        base_layer: as in :class:`afa_kernels.AFALinear`.
        adapters: for each name the options of :class:`afa_kernels.AFALinear` that differ from their defaults.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is wanted.
    """

    def __init__(self, base_layer: nn.Module, adapters: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        reason = why_unsupported(base_layer)
        if reason is not None:
            raise TypeError(f"base_layer: expected {SUPPORTED}; {reason}")
        self.base_layer = base_layer.requires_grad_(False)
        self.train(base_layer.training)
        for name, options in adapters.items():
            self.add_adapter(name, **options)

    def _branch(self, options: BranchOptions) -> Branch:
        return Branch(weight_like(self.base_layer), options, transposed=is_conv1d(self.base_layer))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``base_layer(x)`` plus, for each sample, the branch of its adapter: ``(..., K) -> (..., N)``."""
        assignment = self.assignment()
        calls = self.calls_of(assignment)
        base = self.base_layer
        weight = plain_weight(base)
        if weight is not None:
            return mixed_linear(x, weight, base.bias, assignment, calls)
        y = base(x)
        check_gives_gradient(base, x, y)
        return mixed_lora(x, y, assignment, calls)


def check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of an adapter, got {type(name).__name__}")
    if not name or "." in name or name == BASE or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"name: {name!r} cannot be the name of an adapter: expected no dot, and none of {BASE!r} (no adapter) and "
            "the attributes of a module"
        )


@contextmanager
def adapters_of(model: nn.Module, names: str | Sequence[str]) -> Iterator[None]:
    """Say which adapter computes which sample of the batches that ``model`` is called with in this context.

    Args:
        model: a model with stacks of adapters, as ``inject(model, adapters=...)`` makes it.
        names: the name of an adapter for each sample (each ``x[i]`` of the layers), for each row of x, or one name for
            all. ``"__base__"`` is the frozen model. Samples that are sorted by adapter cost least: others are copied
            into that order, and the result back, in each layer.

    What transformers' gradient checkpointing computes again in the backward has the same names. A model that calls
    ``torch.utils.checkpoint`` by itself needs its backward inside this context.

    Raises:
        TypeError, ValueError: ``model`` has no such layer, or none of them has an adapter that is named; in a call,
            there is another number of samples than names.
    """
    stacks = stacks_of(model)
    assignment = Assignment(names)
    known = adapters_in(stacks)
    unknown = [name for name in assignment.adapters if name != BASE and name not in known]
    if unknown:
        raise ValueError(f"names: the model has no adapter {unknown[0]!r}; it has {', '.join(known)}")

    @contextmanager
    def assigned(_module: nn.Module) -> Iterator[None]:
        before = [stack._assignment for stack in stacks]
        for stack in stacks:
            stack._assignment = assignment
        try:
            yield
        finally:
            for stack, previous in zip(stacks, before, strict=True):
                stack._assignment = previous

    with assigned(model), recomputed_within(model, assigned):
        yield


def add_adapter(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Add an adapter to each stack of ``model``; return it. Options as in :class:`AFALinear`; the experts of a mixture
    all have that rank.

    Raises:
        TypeError, ValueError: an argument does not fit, or there is such an adapter; ``model`` is unchanged then.
    """
    stacks = stacks_of(model)
    if name in adapters_in(stacks):
        raise ValueError(f"name: the model has an adapter {name!r} already")
    for stack in stacks:
        stack.add_adapter(name, **options)  # of options that do not fit, the first one tells
    return model


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Remove an adapter from each layer of ``model`` that has it; return ``model``."""
    stacks = stacks_of(model)
    known = adapters_in(stacks)
    if name not in known:
        raise ValueError(f"name: the model has no adapter {name!r}; it has {', '.join(known)}")
    for stack in stacks:
        if name in stack.adapters:
            stack.delete_adapter(name)
    return model


def stacks_of(model: nn.Module) -> list[AdapterStack]:
    stacks = [module for module in model.modules() if isinstance(module, AdapterStack)]
    if not stacks:
        raise ValueError(
            f"model: expected layers with a stack of adapters, found none in {type(model).__name__}; "
            "inject(model, adapters=...) makes them, and a model of PEFT takes adapter_names=..."
        )
    return stacks


def adapters_in(stacks: list[AdapterStack]) -> list[str]:
    """Return the names of all adapters, in the order in which they came."""
    return list(dict.fromkeys(name for stack in stacks for name in stack.adapters))
