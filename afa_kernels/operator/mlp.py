"""The MLP block ``down(act(gate(x)) * up(x))`` with a branch on all three layers, as one call and its differentiation.

Saved for the backward: x, the outputs of gate and up, and the z of the branches, plus references to weights and
scalars. Never act(gate) or the product h: the backward computes them again, and gradients then take their memory.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import torch_private
from afa_kernels.backend import compiled
from afa_kernels.operator import checks, ops, reference, shared_input_ops
from afa_kernels.operator.activation import ACTIVATIONS
from afa_kernels.operator.functional import LinearCall, as_rows, autocast, like
from afa_kernels.operator.options import Options
from afa_kernels.operator.quantized_weight import any_quantized, apart, dense, together
from afa_kernels.operator.shared_input import fitting, split, why_unfit

# The activations of a block (their values: ACTIVATIONS), with what writes the gradient through them: torch's own
# functions, so that bits are those of the parts.
GATES: dict[str, Callable[..., Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": partial(torch.ops.aten.gelu_backward, approximate="none"),
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}


class _Setup(NamedTuple):
    """All of a call that is no tensor."""

    activation: str  # of GATES
    pair: shared_input_ops.Choice  # who computes gate and up
    down: Options  # its backend is chosen when h is there
    differentiated: bool


def why_apart(x: Tensor, gate: LinearCall, up: LinearCall, down: LinearCall) -> str | None:
    """Return why the layers of a block have to be called one by one on x, or None if they can be one call."""
    reason = fitting([gate, up], x)[1]
    if reason is None and down.options.spec.dropout:
        reason = "dropout draws one mask for each layer"
    if reason is None and (down.weight.requires_grad or (down.bias is not None and down.bias.requires_grad)):
        reason = "a base layer trains"
    # By name: torch.compile of torch 2.6 takes no slice of a named tuple.
    return why_unfit(x, down.weight, down.bias, down.lora_a, down.lora_b) if reason is None else reason


def choice_of(x: Tensor, calls: list[LinearCall], differentiated: bool) -> shared_input_ops.Choice:
    """Return who computes gate and up on rows x."""
    _, _, _, b, alpha_t, options = zip(*calls[:2], strict=True)
    return shared_input_ops.resolved(x, b, options, [alpha is None for alpha in alpha_t], differentiated)


def mlp(x: Tensor, calls: list[LinearCall], activation: str) -> Tensor | None:
    """Return ``down(act(gate(x)) * up(x))``, ``(..., K)`` to ``(..., K)``, of the calls of gate, up and down, which fit
    (:func:`why_apart`), with an activation of ``GATES``; None where torch's operators, which take tensors, would want
    several quantized weights at once."""
    x = autocast("x", x)
    rows = as_rows(x)
    weights, biases, a, b, alpha_t, options = zip(*calls, strict=True)
    weights = [autocast("weight", weight) for weight in weights]
    direct = checks.shared_input(x, list(zip(weights, biases, a, b, strict=True))[:2])
    direct = direct and (compiled.are_plain(*alpha_t) or torch_private.are_ordinary(alpha_t))
    if not direct and any_quantized(weights):
        return None
    differentiated = torch.is_grad_enabled() and any([t.requires_grad for t in (x, *a, *b)])
    setup = _Setup(activation, choice_of(rows, calls, differentiated), options[2], differentiated)
    tensors = (*weights, *biases, *a, *b, *alpha_t)
    if differentiated:
        y = torch_private.apply(MLPFunction, direct, rows, setup, direct, *tensors)
    else:
        y = _forward(direct, rows, setup, tensors)[0]
    return like(y, x, y.shape[-1])


def _forward(direct: bool, x: Tensor, setup: _Setup, tensors: tuple[Tensor | None, ...]):
    """Return y, what the backward needs beside x and the tensors, and the resolved options of down."""
    members = split(tensors)
    weight, bias, a, b, alpha_t = (t[2] for t in members)
    # Each z has a name: torch.compile of torch 2.6 confuses saved tensors that it has to name itself.
    (gate, up), (z_gate, z_up) = shared_input_ops.forward_shared(direct, x, *(t[:2] for t in members), setup.pair)
    h = ACTIVATIONS[setup.activation].value(gate).mul_(up)
    options = ops.resolved(h, b, setup.down, alpha_t is None, setup.differentiated)
    direct = checks.linear(h, weight, bias, a, b) and direct
    y, z = ops.linear_forward(
        direct, weight if direct else dense(weight, h.dtype), bias, h, a, b, alpha_t, None, options, None
    )
    return y, (gate, up, z_gate, z_up, z), options


class MLPFunction(torch.autograd.Function):
    """``apply(x, setup, direct, *tensors)`` on checked operands: ``x (M, K)``, and weights, biases, A, B and alpha_t of
    gate, up and down. Returns the output of the block, ``(M, K)``."""

    @staticmethod
    def forward(ctx, x, setup, direct, *tensors):
        y, saved, ctx.down = _forward(direct, x, setup, tensors)
        weights, ctx.quantized = apart(tensors[:3])
        ctx.save_for_backward(x, *saved, *weights, *tensors[3:])
        ctx.setup, ctx.direct = setup, direct
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, up, *rest = saved = ctx.saved_tensors
        zs, members, needs = rest[:3], split(rest[3:]), ctx.needs_input_grad
        need_x, need_a, need_b = needs[0], list(needs[9:12]), list(needs[12:15])
        # A hook on saved tensors may have returned other tensors than the forward saved.
        direct = ctx.direct and not torch_private.operators_are_watched()
        direct = direct and (compiled.are_plain(dy, *saved) or torch_private.are_ordinary((dy, *saved)))
        differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        by_formula = differentiated or (not direct and torch_private.is_batched(dy))
        members[0] = together(members[0], ctx.quantized)
        if not direct or by_formula:
            members[0] = [dense(w, x.dtype) for w in members[0]]
        if by_formula:
            dx, da, db = _differentiable(dy, x, members, ctx.setup, ctx.down)
        else:
            activations = gate, up, zs
            dx, da, db = _backward(direct, dy, x, activations, members, ctx.setup, ctx.down, need_x, need_a, need_b)
        found = zip((dx, *da, *db), (need_x, *need_a, *need_b), strict=True)
        dx, *gradients = (t if needed else None for t, needed in found)
        return (dx, *(None,) * 8, *gradients, *(None,) * 3)


def _backward(direct, dy, x, activations, members, setup, options, need_x, need_a, need_b):
    """Return dx, and dA and dB of each member."""
    gate, up, (*zs, z) = activations
    weights, _, a, b, alpha_t = members
    value = ACTIVATIONS[setup.activation].value(gate)
    h = value * up
    saved = (dy, h, a[2], b[2], z, alpha_t[2], None, options, None)
    if not (need_x or any(need_a[:2]) or any(need_b[:2])):
        _, da, db = ops.lora_backward(direct, *saved, False, need_a[2], need_b[2])
        return None, [None, None, da], [None, None, db]
    dh, da, db = ops.linear_backward(direct, weights[2], *saved, need_a[2], need_b[2])
    if torch.compiler.is_compiling():  # a graph plans its memory itself
        dup, dgate = dh * value, GATES[setup.activation](dh * up, gate)
    else:  # all three were made here, and nothing else reads them: gradients take their memory
        dup = torch.mul(dh, value, out=h)
        dgate = GATES[setup.activation](dh.mul_(up), gate, grad_input=value)
    del dh, saved
    of_pair = ([dgate, dup], x, weights[:2], a[:2], b[:2], zs, alpha_t[:2], setup.pair)
    dx, das, dbs = shared_input_ops.backward_shared(direct, *of_pair, need_x, need_a[:2], need_b[:2])
    return dx, [*das, da], [*dbs, db]


def _differentiable(dy, x, members, setup: _Setup, options: Options):
    """Return the gradients as plain torch ops, for whoever differentiates them once more."""
    weights, biases, a, b, alpha_t = members
    act, pair = ACTIVATIONS[setup.activation], setup.pair
    with ops.plain_precision(x):
        ys = []
        for i in (0, 1):
            base = F.linear(x, weights[i], None if biases[i] is None else biases[i].to(x.dtype))
            ys.append(reference.forward(x, a[i], b[i], alpha_t[i], None, pair.options[i].spec, base)[0])
        gate, up = ys
        value = act.value(gate)
        dh, da, db = reference.backward(dy, value * up, a[2], b[2], alpha_t[2], None, options.spec)
        dh = dh + dy @ weights[2]
        slope = act.slope(gate.to(reference.compute_dtype(x.dtype))).to(x.dtype)
        dys = [dh * up * slope, dh * value]
        rest = (weights[:2], a[:2], b[:2], alpha_t[:2])
        dx, das, dbs = shared_input_ops.differentiable_backward(dys, x, *rest, pair)
    return dx, [*das, da], [*dbs, db]
