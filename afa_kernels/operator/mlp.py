"""The MLP block ``down(act(gate(x)) * up(x))`` with a branch on all three layers, as one call and its differentiation.

Saved for the backward: x, the outputs of gate and up, and the z of the branches, plus references to weights and
scalars. Never act(gate), their product h or a dropout mask: the backward computes h again, and once it was used its
memory holds a gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import torch_private
from afa_kernels.backend import compiled
from afa_kernels.operator import checks, ops, reference, shared_input_ops
from afa_kernels.operator.functional import LinearCall, as_rows, autocast, like, on_device, seed_on_device
from afa_kernels.operator.options import Options
from afa_kernels.operator.shared_input import fitting, why_unfit
from afa_kernels.operator.shared_input_ops import Choice


class Gate(NamedTuple):
    """The activation of a block."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]  # (gradient, gate); torch's own, so that it has the bits of torch's
    options: dict[str, str]


GATES = {
    "silu": Gate(F.silu, torch.ops.aten.silu_backward, {}),
    "gelu": Gate(F.gelu, torch.ops.aten.gelu_backward, {"approximate": "none"}),
    "gelu_tanh": Gate(lambda t: F.gelu(t, approximate="tanh"), torch.ops.aten.gelu_backward, {"approximate": "tanh"}),
}


class MLPCall(NamedTuple):
    """What the layers of a block compute with on one x."""

    gate: LinearCall
    up: LinearCall
    down: LinearCall
    activation: str  # of GATES
    up_first: bool = False  # the module calls up before gate: their dropout seeds are drawn in that order


class _Member(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    alpha_t: Tensor | None
    seed: Tensor | None


class _Setup(NamedTuple):
    """All of a call that is no tensor."""

    activation: str
    pair: Choice  # of gate and up
    down: Options  # its backend is chosen when h is there
    differentiated: bool


def why_apart(x: Tensor, gate: LinearCall, up: LinearCall, down: LinearCall) -> str | None:
    """Return why the layers of a block have to be called one by one on x, or None if they can be one call."""
    reason = fitting([gate, up], x, dropout=True)[1]
    if reason is not None:
        return reason
    if down.weight.requires_grad or (down.bias is not None and down.bias.requires_grad):
        return "a base layer trains"
    return why_unfit(x, *down[:4])


def mlp(x: Tensor, call: MLPCall) -> Tensor:
    """Return ``down(act(gate(x)) * up(x))`` of layers that fit (:func:`why_apart`): ``(..., K)`` to ``(..., K)``."""
    x = autocast("x", x)
    rows, calls = as_rows(x), call[:3]
    seeds: list[Tensor | None] = [None] * 3
    for i in (1, 0, 2) if call.up_first else (0, 1, 2):
        if calls[i].options.spec.dropout:
            seeds[i] = seed_on_device(None, x.device)
    members = [_member(c, seed, x.device) for c, seed in zip(calls, seeds, strict=True)]
    pair = members[:2]
    direct = checks.shared_input(x, [m[:4] for m in pair])
    scalars = [t for m in members for t in m[4:]]
    direct = direct and (compiled.are_plain(*scalars) or torch_private.are_ordinary(scalars))
    differentiated = torch.is_grad_enabled() and (
        x.requires_grad or any([m.a.requires_grad or m.b.requires_grad for m in members])
    )
    options, identities = [c.options for c in calls[:2]], [m.alpha_t is None for m in pair]
    choice = shared_input_ops.resolved(rows, [m.b for m in pair], options, identities, differentiated)
    setup = _Setup(call.activation, choice, call.down.options, differentiated)
    if differentiated:
        tensors = [t for m in members for t in m]
        y = torch_private.apply(MLPFunction, direct, rows, setup, direct, *tensors)
    else:
        y = _forward(direct, rows, setup, members)[0]
    return like(y, x, y.shape[-1])


def _member(call: LinearCall, seed: Tensor | None, device: torch.device) -> _Member:
    # The one place where the frozen weights come in.
    weight, bias, a, b, alpha_t, _ = call
    alpha_t = None if alpha_t is None else on_device(alpha_t, torch.float32, device)
    return _Member(autocast("weight", weight), bias, a, b, alpha_t, seed)


def _forward(direct: bool, x: Tensor, setup: _Setup, members: list[_Member]):
    """Return y, what the backward needs beside x and the members, and the resolved options of down."""
    *pair, down = members
    (gate, up), zs = _forward_pair(direct, x, pair, setup.pair)
    h = GATES[setup.activation].value(gate).mul_(up)
    options = ops.resolved(h, down.b, setup.down, down.alpha_t is None, setup.differentiated)
    direct = checks.linear(h, *down[:4]) and direct
    y, z = ops.linear_forward(direct, down.weight, down.bias, h, *down[2:], options, None)
    return y, (gate, up, *zs, z), options


class MLPFunction(torch.autograd.Function):
    """``apply(x, setup, direct, *tensors)`` on checked operands: ``x (M, K)``, and weight, bias, A, B, alpha_t and
    seed of gate, up and down. Returns the output of the block, ``(M, K)``."""

    @staticmethod
    def forward(ctx, x, setup, direct, *tensors):
        y, saved, ctx.down = _forward(direct, x, setup, _members(tensors))
        ctx.save_for_backward(x, *saved, *tensors)
        ctx.setup, ctx.direct = setup, direct
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        x, activations, members = saved[0], saved[1:6], _members(saved[6:])
        needs = ctx.needs_input_grad
        need = needs[0], list(needs[5::6]), list(needs[6::6])
        # A hook on saved tensors may have returned other tensors than the forward saved.
        direct = ctx.direct and not torch_private.operators_are_watched()
        direct = direct and (compiled.are_plain(dy, *saved) or torch_private.are_ordinary((dy, *saved)))
        differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if differentiated or (not direct and torch_private.is_batched(dy)):
            dx, da, db = _differentiable(dy, x, members, ctx.setup, ctx.down)
        else:
            dx, da, db = _backward(direct, dy, x, activations, members, ctx.setup, ctx.down, *need)
        gradients = [dx if need[0] else None, None, None]
        for da_i, db_i, need_a, need_b in zip(da, db, *need[1:], strict=True):
            gradients += [None, None, da_i if need_a else None, db_i if need_b else None, None, None]
        return tuple(gradients)


def _members(tensors) -> list[_Member]:
    return [_Member(*tensors[i : i + 6]) for i in (0, 6, 12)]


def _backward(direct, dy, x, activations, members, setup, options, need_x, need_a, need_b):
    """Return dx, and dA and dB of each member."""
    gate, up, *zs, z = activations
    *pair, down = members
    act = GATES[setup.activation]
    through = need_x or any(need_a[:2]) or any(need_b[:2])
    value = act.value(gate)
    h = value * up
    dh, da, db = _backward_of(direct, dy, h, down, z, options, through, need_a[2], need_b[2])
    if not through:
        return None, [None, None, da], [None, None, db]
    # All three were made here, and nothing else reads them: gradients take their memory.
    dup = torch.mul(dh, value, out=h)
    dgate = act.backward.grad_input(dh.mul_(up), gate, **act.options, grad_input=value)
    del dh, h, value
    dx, das, dbs = _backward_pair(
        direct, [dgate, dup], x, pair, zs, setup.pair, need_x, list(need_a[:2]), list(need_b[:2])
    )
    return dx, [*das, da], [*dbs, db]


def _backward_of(direct, dy, x, m: _Member, z, options: Options, need_dx, need_da, need_db):
    saved = (dy, x, m.a, m.b, z, m.alpha_t, m.seed, options, None)
    if need_dx:
        return ops.linear_backward(direct, m.weight, *saved, need_da, need_db)
    return ops.lora_backward(direct, *saved, False, need_da, need_db)


def _drops(choice: Choice) -> bool:
    """Whether gate or up drops x in its branch: each has a mask of its own, and they compute one by one."""
    return any([o.spec.dropout > 0 for o in choice.options])


def _forward_pair(direct, x, pair: list[_Member], choice: Choice):
    if not _drops(choice):
        weights, biases, a, b, alpha_t, _ = map(list, zip(*pair, strict=True))
        return shared_input_ops.forward_shared(direct, x, weights, biases, a, b, alpha_t, choice)
    results = [
        ops.linear_forward(direct, m.weight, m.bias, x, *m[2:], o, None)
        for m, o in zip(pair, choice.options, strict=True)
    ]
    return list(zip(*results, strict=True))


def _backward_pair(direct, dys, x, pair, zs, choice: Choice, need_x, need_a, need_b):
    if not _drops(choice):
        weights, _, a, b, alpha_t, _ = map(list, zip(*pair, strict=True))
        saved = (dys, x, weights, a, b, list(zs), alpha_t, choice)
        return shared_input_ops.backward_shared(direct, *saved, need_x, need_a, need_b)
    results = [
        _backward_of(direct, dy, x, m, z, o, need_x, *needs)
        for dy, m, z, o, *needs in zip(dys, pair, zs, choice.options, need_a, need_b, strict=True)
    ]
    (dx, other), da, db = zip(*results, strict=True)
    return dx.add_(other) if need_x else None, da, db


def _differentiable(dy, x, members, setup: _Setup, options: Options):
    """Return the gradients as plain torch ops, for whoever differentiates them once more."""
    *pair, down = members
    act, specs = GATES[setup.activation], [o.spec for o in setup.pair.options]

    def forward(m: _Member, spec):
        base = F.linear(x, m.weight, None if m.bias is None else m.bias.to(x.dtype))
        return reference.forward(x, m.a, m.b, m.alpha_t, m.seed, spec, base)[0]

    def backward(dy, x, m: _Member, spec):
        dx, da, db = reference.backward(dy, x, *m[2:], spec)
        return dx + dy @ m.weight, da, db

    with ops.plain_precision(x):
        gate, up = (forward(m, spec) for m, spec in zip(pair, specs, strict=True))
        value = act.value(gate)
        dh, da, db = backward(dy, value * up, down, options.spec)
        dys = act.backward(dh * up, gate, **act.options), dh * value
        (dx, *first), (other, *second) = (backward(d, x, *rest) for d, *rest in zip(dys, pair, specs, strict=True))
        return dx + other, [first[0], second[0], da], [first[1], second[1], db]
