"""Layers that read the same x, as one call: what fits together, and its differentiation.

One operator for all of them (shared_input_ops.py): a backend that takes them together reads x once for every z in the
forward, and once for every dA in the backward, and accumulates dx of all members in one tensor, where separate layers
make one each and autograd adds them up.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from afa_kernels import torch_private
from afa_kernels.backend import compiled
from afa_kernels.operator import checks, shared_input_ops
from afa_kernels.operator.functional import LinearCall, as_rows, autocast, like
from afa_kernels.operator.quantized_weight import QuantizedWeight, any_quantized, apart, dense, together
from afa_kernels.torch_private import (
    are_ordinary,
    autocast_may_be_on,
    in_forward_mode,
    in_transform,
    is_batched,
    operators_are_watched,
)


class Calls(NamedTuple):
    """What the members compute with on one x."""

    members: list[LinearCall]
    recognized: bool  # all operands are ordinary and fit: nothing is left to check


def fitting(members: list[LinearCall], x: Tensor) -> tuple[Calls | None, str | None]:
    """Return ``members`` as what computes together on x, or None and the reason why they do not fit."""
    recognized = not autocast_may_be_on() and not operators_are_watched()
    recognized = recognized and compiled.recognizes_shared(x, members)
    first = members[0].options
    for weight, bias, lora_a, lora_b, _, options in members:
        if options.spec.dropout:
            return None, "dropout draws one mask for each layer"
        if options.backend != first.backend:
            return None, "their backends differ"
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return None, "a base layer trains"
        if recognized:
            continue
        reason = why_unfit(x, weight, bias, lora_a, lora_b)
        if reason is not None:
            return None, reason
        if x.layout != torch.strided or x.dim() == 0 or x.shape[-1] != lora_a.shape[-1]:
            return None, f"x has shape {tuple(x.shape)} and layout {x.layout}"
    if in_forward_mode() or (not recognized and in_transform()):
        return None, "a transform of torch.func or forward-mode differentiation"
    return Calls(members, recognized), None


def why_unfit(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> str | None:
    """Return why x and the parameters of a layer cannot be operands of one call, or None if they can."""
    for t in (weight, bias, lora_a, lora_b):
        if t is None:
            continue
        if type(t) not in (nn.Parameter, Tensor, QuantizedWeight):
            return f"a parameter is a {type(t).__name__}"
        if t.device != x.device:
            return "a parameter is on another device"
    if type(weight) is not QuantizedWeight and weight.dtype != x.dtype and autocast_dtype(x) is None:
        return "x has another dtype than a weight"
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast rounds to on the device of x, or None where it is off."""
    if not autocast_may_be_on():
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def linear_shared(x: Tensor, calls: Calls) -> list[Tensor] | None:
    """Return the output of each member on x; None where no backend takes them together, so that each layer has to
    compute by itself. In a trace of torch.compile, where no backend is chosen yet, the operator does that."""
    x = autocast("x", x)
    rows = as_rows(x)
    weights, biases, a, b, alpha_t, options = zip(*calls.members, strict=True)
    direct = calls.recognized
    if not direct:
        weights = [autocast("weight", weight) for weight in weights]
        direct = checks.shared_input(x, list(zip(weights, biases, a, b, strict=True)))
    direct = direct and (compiled.are_plain(*alpha_t) or are_ordinary(alpha_t))
    if not direct and any_quantized(weights):
        return None  # an operator of torch takes tensors: all weights would have to be dequantized at once
    identities = [alpha is None for alpha in alpha_t]
    # No base layer trains here.
    differentiated = torch.is_grad_enabled() and (
        x.requires_grad or any([t.requires_grad for t in a]) or any([t.requires_grad for t in b])
    )
    choice = shared_input_ops.resolved(rows, b, options, identities, differentiated)
    if choice.together is None and not torch.compiler.is_compiling():
        return None
    tensors = (*weights, *biases, *a, *b, *alpha_t)
    if differentiated:
        ys = torch_private.apply(AFASharedInputFunction, direct, rows, choice, direct, *tensors)
    else:
        ys, _ = shared_input_ops.forward_shared(direct, rows, *split(tensors), choice)
    return [like(y, x, y.shape[-1]) for y in ys]


def split(tensors: tuple[Tensor | None, ...]) -> list[list[Tensor | None]]:
    """Return weights, biases, A, B and alpha_t of the members."""
    n = len(tensors) // 5
    return [list(tensors[i * n : (i + 1) * n]) for i in range(5)]


class AFASharedInputFunction(torch.autograd.Function):
    """``apply(x, choice, direct, *tensors)`` on checked operands: ``x (M, K)`` and the members' weights, biases, A, B
    and alpha_t. Returns the members' outputs.

    One node with several outputs: its backward runs once, when the gradients of all are there.
    """

    @staticmethod
    def forward(ctx, x, choice, direct, *tensors):
        weights, biases, a, b, alpha_t = split(tensors)
        ys, zs = shared_input_ops.forward_shared(direct, x, weights, biases, a, b, alpha_t, choice)
        weights, ctx.quantized = apart(weights)
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
        direct = direct and (compiled.are_plain(*tensors) or are_ordinary(tensors))
        differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        by_formula = differentiated or (not direct and any([is_batched(dy) for dy in grads]))
        weights = together(weights, ctx.quantized)
        if not direct or by_formula:
            weights = [dense(w, x.dtype) for w in weights]
        if by_formula:
            dx, da, db = shared_input_ops.differentiable_backward(grads, x, weights, a, b, alpha_t, ctx.choice)
        else:
            dx, da, db = shared_input_ops.backward_shared(
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
