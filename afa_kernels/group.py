"""Layers that read the same x (q, k and v of an attention, gate and up of an MLP), computed together.

A backend that takes them together reads x once for every z in the forward, and once for every dA in the backward; dx of
all members is accumulated in one tensor, where separate layers make one each and autograd adds them up.
:class:`AFALinearGroup` says it in code; shared_input.py does it for model code that calls the layers one by one.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afa_kernels import _group_ops, checks, torch_private
from afa_kernels.backend import native
from afa_kernels.functional import LinearCall, _as_rows, _like, autocast
from afa_kernels.torch_private import (
    are_ordinary,
    autocast_may_be_on,
    in_forward_mode,
    in_transform,
    is_batched,
    operators_are_watched,
)


class AFALinearGroup(nn.Module):
    """Several :class:`AFALinear` layers applied to the same x, in one pass over it.

    ``group(x) == tuple(layer(x) for layer in layers)``, with the same gradients. dx is one sum over
    all members, which agrees with that of separate layers to a rounding (docs/groups.md says what
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
        ys = on_shards(self.layers, x) if calls is None else group_linear(x, calls)
        return tuple(layer(x) for layer in self.layers) if ys is None else tuple(ys)


def why_separate(layers: list[nn.Module], x: Tensor) -> str | None:
    """Return why ``layers`` cannot compute together on ``x``, or None if they can."""
    return calls_of(layers, x)[1]


class Calls(NamedTuple):
    """What the members of a group compute with on one x."""

    members: list[LinearCall]
    recognized: bool  # all operands are ordinary and fit: nothing is left to check


def calls_of(layers: Iterable[nn.Module], x: Tensor) -> tuple[Calls | None, str | None]:
    """Return what the layers compute with, together; or None and the reason why they compute one by one."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return None, f"x is a {type(x).__name__}"
    members = []
    for layer in layers:
        call = None if is_hooked(layer) else layer.linear_call()
        if call is None:
            return None, "a member or its base is merged, has hooks or a forward of its own"
        members.append(call)
    return fitting(members, x)


def fitting(members: list[LinearCall], x: Tensor) -> tuple[Calls | None, str | None]:
    """Return ``members`` as what computes together on x, or None and the reason why they do not fit."""
    recognized = not autocast_may_be_on() and not operators_are_watched()
    recognized = recognized and native.recognizes_group(x, members)
    first = members[0].options
    for weight, bias, lora_a, lora_b, _, options in members:
        if options.spec.dropout:
            return None, "dropout draws one mask for each layer"
        if options.backend != first.backend:
            return None, "their backends differ"
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return None, "a base layer trains"
        reason = None if recognized else _why_unfit(x, weight, bias, lora_a, lora_b)
        if reason is not None:
            return None, reason
    if in_forward_mode() or (not recognized and in_transform()):
        return None, "a transform of torch.func or forward-mode differentiation"
    return Calls(members, recognized), None


def _why_unfit(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> str | None:
    for t in (weight, bias, lora_a, lora_b):
        if t is None:
            continue
        if type(t) is not nn.Parameter and type(t) is not Tensor:
            return f"a parameter is a {type(t).__name__}"
        if t.device != x.device:
            return "a parameter is on another device"
    if weight.dtype != x.dtype and autocast_dtype(x) is None:
        return "x has another dtype than a weight"
    if x.layout != torch.strided or x.dim() == 0 or x.shape[-1] != lora_a.shape[-1]:
        return f"x has shape {tuple(x.shape)} and layout {x.layout}"
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast rounds to on the device of x, or None where it is off."""
    if not autocast_may_be_on():
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


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


def group_linear(x: Tensor, calls: Calls, *, only_together: bool = False) -> list[Tensor] | None:
    """Return the output of each member on x.

    ``only_together``: None where no backend takes them together, so that each layer may as well compute by itself.
    """
    x = autocast("x", x)
    rows = _as_rows(x)
    weights, biases, a, b, alpha_t, options = zip(*calls.members, strict=True)
    direct = calls.recognized
    if not direct:
        weights = [autocast("weight", weight) for weight in weights]
        direct = checks.group(x, list(zip(weights, biases, a, b, strict=True)))
    direct = direct and (native.are_plain(*alpha_t) or are_ordinary(alpha_t))
    identities = [alpha is None for alpha in alpha_t]
    # Base layers train in no group.
    differentiated = torch.is_grad_enabled() and (
        x.requires_grad or any([t.requires_grad for t in a]) or any([t.requires_grad for t in b])
    )
    choice = _group_ops.resolved(rows, b, options, identities, differentiated)
    if only_together and choice.together is None and not torch.compiler.is_compiling():
        return None
    tensors = (*weights, *biases, *a, *b, *alpha_t)
    if differentiated:
        ys = torch_private.apply(AFAGroupFunction, direct, rows, choice, direct, *tensors)
    else:
        ys, _ = _group_ops.group_forward(direct, rows, *_split(tensors), choice)
    return [_like(y, x, y.shape[-1]) for y in ys]


def on_shards(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
    """Return the output of each member on x, computed together on the shards that tensor parallelism gave this process;
    None where it did not split all of them over their outputs, on one mesh."""
    parallel = getattr(layers[0], "_parallel", None)
    return None if parallel is None or torch.compiler.is_compiling() else parallel.together(layers, x)


def _split(tensors: tuple[Tensor | None, ...]) -> list[list[Tensor | None]]:
    """Return weights, biases, A, B and alpha_t of the members."""
    n = len(tensors) // 5
    return [list(tensors[i * n : (i + 1) * n]) for i in range(5)]


class AFAGroupFunction(torch.autograd.Function):
    """``apply(x, choice, direct, *tensors)`` on checked operands: ``x (M, K)`` and the members' weights, biases, A, B
    and alpha_t. Returns the members' outputs.

    One node with several outputs: its backward runs once, when the gradients of all are there.
    """

    @staticmethod
    def forward(ctx, x, choice, direct, *tensors):
        weights, biases, a, b, alpha_t = _split(tensors)
        ys, zs = _group_ops.group_forward(direct, x, weights, biases, a, b, alpha_t, choice)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, *a, *b, *alpha_t, *(zs if choice.options[0].save_z else ()))
        ctx.choice, ctx.direct = choice, direct
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads):
        x, *rest = ctx.saved_tensors
        n = len(grads)
        weights, a, b, alpha_t, zs = (rest[i * n : (i + 1) * n] for i in range(5))
        needs = ctx.needs_input_grad
        need_x, need_a, need_b = needs[0], needs[3 + 2 * n : 3 + 3 * n], needs[3 + 3 * n :][:n]
        given = [dy is not None for dy in grads]
        # A hook on saved tensors may have returned other tensors than the forward saved.
        tensors = (*grads, x, *rest)
        direct = ctx.direct and not operators_are_watched()
        direct = direct and (native.are_plain(*tensors) or are_ordinary(tensors))
        differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if differentiated or (not direct and any([is_batched(dy) for dy in grads])):
            dx, da, db = _group_ops.differentiable_backward(grads, x, weights, a, b, alpha_t, ctx.choice)
        else:
            dx, da, db = _group_ops.group_backward(
                direct, list(grads), x, weights, a, b, zs, alpha_t, ctx.choice,
                need_x, list(need_a), list(need_b),
            )  # fmt: skip
        return (
            dx if need_x and any(given) else None,
            *(None,) * (2 + 2 * n),
            *(t if need and g else None for t, need, g in zip(da, need_a, given, strict=True)),
            *(t if need and g else None for t, need, g in zip(db, need_b, given, strict=True)),
            *(None,) * n,
        )
