"""What layers, groups and the variant for PEFT ask of the frozen layer beside a branch."""

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, a linear layer with its weight as (K, N)."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2
    )


def is_plain(module: nn.Module) -> bool:
    """Whether ``module(x)`` is ``x @ W.T + bias`` and nothing else sees or changes it on the way.

    Sharding, offloading and tensor parallelism hook into a layer; its weight may then be whole during a call only.
    """
    own = module.__dict__
    return (
        (type(module) is nn.Linear or is_conv1d(module))
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
    )


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer or a Conv1D as ``(N, K)``."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


class LikeItsBase:
    """Base of the layers that stand in for ``base_layer``: what code that inspects a linear layer expects to find."""

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias
