"""Layers that read the same x (q, k and v of an attention, gate and up of an MLP), computed together.

:class:`AFASharedInput` says it in code; model/sharing.py does it for model code that calls the layers one by one.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from afa_kernels.operator.shared_input import Calls, fitting, linear_shared


class AFASharedInput(nn.Module):
    """Several :class:`AFALinear` layers applied to the same x, in one pass over it.

    ``shared(x) == tuple(layer(x) for layer in layers)``, with the same gradients. dx is one sum over
    all members, which agrees with that of separate layers to a rounding (docs/shared_input.md says what
    agrees to the bit). Ranks, scalings, activations, alpha_t and the dtypes of A and B may differ
    from member to member.

    Args:
        layers: two or more AFALinear layers, or layers of PEFT with an adapter of this package, with the same
            ``in_features``. They keep their own parameters and stay usable alone.

    Raises:
        TypeError, ValueError: an element of ``layers`` does not fit; the message says which.

    A member that cannot share makes all of them run one by one: it is merged, drops x (each layer
    has its own mask, so no product is shared), trains its base, has a base that hooks or another
    class change, has another ``backend``, or x is no plain tensor (a DTensor, say, unless all members have
    the style ``ColwiseAFA``).
    """

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        layers = list(layers)
        check_layers(layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer: ``(..., K) -> (..., N_i)``."""
        calls, _ = calls_of(self.layers, x)
        ys = on_shards(self.layers, x) if calls is None else linear_shared(x, calls)
        return tuple(layer(x) for layer in self.layers) if ys is None else tuple(ys)


def why_separate(layers: list[nn.Module], x: Tensor) -> str | None:
    """Return why ``layers`` cannot compute together on ``x``, or None if they can."""
    return calls_of(layers, x)[1]


def calls_of(layers: Iterable[nn.Module], x: Tensor) -> tuple[Calls | None, str | None]:
    """Return what the layers compute with, together; or None and the reason why they compute one by one."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return None, f"x is a {type(x).__name__}"
    members = []
    for layer in layers:
        call = None if is_hooked(layer) else layer.linear_call(x)
        if call is None:
            return None, "a member or its base is merged, has hooks or a forward of its own"
        members.append(call)
    return fitting(members, x)


def is_hooked(layer: nn.Module) -> bool:
    """Whether something must run before ``layer`` does (a prefetch of its parameters, say), which
    only a call of the layer itself brings about."""
    return bool(
        "forward" in layer.__dict__ or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def check_layers(layers: list[nn.Module]) -> None:
    for layer in layers:
        if not hasattr(layer, "linear_call"):
            raise TypeError(f"layers: expected AFALinear layers, got a {type(layer).__name__}")
    if len(layers) < 2 or len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(f"layers: expected two or more different layers, got {len(layers)}")
    sizes = [layer.in_features for layer in layers]
    if len(set(sizes)) > 1:
        raise ValueError(f"layers: expected the same in_features, got {sizes}")


def on_shards(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
    """Return the output of each member on x, computed together on the shards that tensor parallelism gave this process;
    None where it did not split all of them over their outputs, on one mesh."""
    parallel = getattr(layers[0], "_parallel", None)
    return None if parallel is None or torch.compiler.is_compiling() else parallel.together(layers, x)
