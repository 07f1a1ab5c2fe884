"""The operators of layers that share their input: all branches in one pass over x where one backend takes them together
(``choice.select_together``), else layer by layer.

As in ops.py, each operator has a function of its name with ``direct`` as its first argument. A list has one entry for
each member. What is not needed is None in what a direct call returns, and a tensor with 0 elements in what the operator
returns.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from afa_kernels.backend.choice import (
    get,
    remembered,
    requested,
    requested_in_trace,
    select,
    select_together,
)
from afa_kernels.backend.interface import Call, Member
from afa_kernels.operator import frozen, ops, reference
from afa_kernels.operator.options import Options, Spec, at_identity
from afa_kernels.operator.reference import compute_dtype

_MEMBERS = "Tensor[] lora_a, Tensor[] lora_b, Tensor?[] alpha_t, str[] activations, float[] scalings"


class Choice(NamedTuple):
    """Who computes the members, in both directions: the backend that takes all of them at once, or None and each by
    itself with its own options. In a trace the operators choose when they run, from what was requested."""

    requested: str | None
    together: str | None
    options: tuple[Options, ...]


def resolved(
    x: Tensor, b: list[Tensor], options: list[Options], identities: list[bool], differentiated: bool
) -> Choice:
    """Return all that the operands of members decide: identity, whether a backward may want z, the backends."""
    decided = tuple(options), tuple(identities), differentiated
    if is_compiling():
        name = requested_in_trace(options[0].backend)
        return Choice(name, None, _decided(*decided, name))
    name = requested(options[0].backend)
    return _resolved(x.device, x.dtype, x.shape, tuple([t.shape for t in b]), *decided, name)


@remembered
def _resolved(device, dtype, rows, shapes, options, identities, differentiated, name) -> Choice:
    calls, chosen = [], []
    decided = _decided(options, identities, differentiated, name)
    for shape, (spec, save_z, _) in zip(shapes, decided, strict=True):
        calls.append(Call(device.type, dtype, *rows, *shape, spec.activation, spec.dropout > 0, device.index))
        chosen.append(Options(spec, save_z, select(calls[-1], name).backend.name))
    together = select_together(tuple(calls), name)[0]
    return Choice(name, None if together is None else together.name, tuple(chosen))


def _decided(options, identities, differentiated, name) -> tuple[Options, ...]:
    members = [at_identity(o) if identity else o for o, identity in zip(options, identities, strict=True)]
    return tuple([Options(o.spec, o.save_z and differentiated, name) for o in members])


def _choice_of(x: Tensor, b: list[Tensor], activations, scalings, save_z: bool, name: str | None) -> Choice:
    """Return what ``resolved`` gives for the arguments of an operator."""
    options = [Options(Spec(*pair), save_z, name) for pair in zip(activations, scalings, strict=True)]
    return resolved(x, b, options, [False] * len(b), True)


def _members(a: list[Tensor], b: list[Tensor], alpha_t: list[Tensor | None], choice: Choice) -> list[Member]:
    return [Member(*m, o.spec) for *m, o in zip(a, b, alpha_t, choice.options, strict=True)]


# --- the implementations


def _forward_shared(x, weights, biases, a, b, alpha_t, choice):
    """Return every y and every z."""
    save_z = choice.options[0].save_z
    if x.shape[0] == 0:
        return [x.new_empty(0, t.shape[0]) for t in b], [x.new_empty(0, t.shape[0]) if save_z else None for t in a]
    members = _members(a, b, alpha_t, choice)
    layers = list(zip(weights, biases, strict=True))
    if choice.together is None:
        results = [
            ops.linear_forward(True, *layer, x, m.a, m.b, m.alpha_t, None, o, None)
            for layer, m, o in zip(layers, members, choice.options, strict=True)
        ]
        return [y for y, _ in results], [z for _, z in results]
    together, spec = get(choice.together), members[0].spec
    with ops.plain_precision(x):
        begun = [frozen.begin(together, spec, x, *layer) for layer in layers]
        ys, bases, _ = map(list, zip(*begun, strict=True))
        zs = together.forward_shared(x, members, bases=bases, outs=ys, save_z=save_z)
        for (y, _, product_to_come), weight in zip(begun, weights, strict=True):
            if product_to_come:
                frozen.finish(y, x, weight)
    return ys, zs if save_z else [None] * len(ys)


def _backward_shared(dys, x, weights, a, b, zs, alpha_t, choice, need_dx, need_da, need_db):
    """Return dx, every da and every db. A member without dy adds nothing to dx, and its da and db are None."""
    da, db = [None] * len(a), [None] * len(b)
    given = [i for i, dy in enumerate(dys) if dy is not None]
    if not (need_dx or any(need_da[i] or need_db[i] for i in given)) or not given:
        return None, da, db
    members = _members(a, b, alpha_t, choice)
    if x.shape[0] == 0:
        dx = torch.empty_like(x) if need_dx else None
        found = [
            [torch.zeros_like(t[i]) if need[i] else None for i in given] for t, need in ((a, need_da), (b, need_db))
        ]
    elif choice.together is None:
        dx, *found = _one_by_one(dys, x, weights, members, choice.options, zs, given, need_dx, need_da, need_db)
    else:
        together = get(choice.together)
        dx, *found = _together(together, dys, x, weights, members, zs, given, need_dx, need_da, need_db)
    for i, da_i, db_i in zip(given, *found, strict=True):
        da[i], db[i] = da_i, db_i
    return dx, da, db


def _together(backend, dys, x, weights, members, zs, given, need_dx, need_da, need_db):
    def of_given(values: list) -> list:
        return [values[i] for i in given]

    dys, members, weights, zs = of_given(dys), of_given(members), of_given(weights), of_given(zs)
    needs = {"need_dx": need_dx, "need_da": of_given(need_da), "need_db": of_given(need_db)}
    # From the last to the first, as layers apart: the forward read the last weight last, and a small call finds it
    # in the caches.
    products = list(zip(dys, weights, strict=True))[::-1] if need_dx else []
    with ops.plain_precision(x):
        begun = frozen.begin_backward(backend, members[0].spec, *products[0]) if products else None
        if begun is not None:
            for product in products[1:]:
                frozen.finish_backward(begun, *product)
            needs["dx"], products = begun, []
        dx, das, dbs = backend.backward_shared(dys, x, members, zs, **needs)
        for product in products:
            frozen.finish_backward(dx, *product)
    return dx, das, dbs


def _one_by_one(dys, x, weights, members, options, zs, given, need_dx, need_da, need_db):
    dx, da, db = None, [], []
    for i in given:
        m = members[i]
        saved = (dys[i], x, m.a, m.b, zs[i], m.alpha_t, None, options[i], None)
        if need_dx:
            dx_i, da_i, db_i = ops.linear_backward(True, weights[i], *saved, need_da[i], need_db[i])
            dx = dx_i if dx is None else dx.add_(dx_i)
        else:
            _, da_i, db_i = ops.lora_backward(True, *saved, False, need_da[i], need_db[i])
        da.append(da_i)
        db.append(db_i)
    return dx, da, db


def differentiable_backward(dys, x, weights, a, b, alpha_t, choice: Choice):
    """Return dx, every da and every db as plain torch ops: the sum of the members' closed
    formulas."""
    dx, da, db = torch.zeros_like(x, dtype=compute_dtype(x.dtype)), [], []
    with ops.plain_precision(x):
        for i, dy in enumerate(dys):
            if dy is None:
                da.append(None)
                db.append(None)
                continue
            dx_i, da_i, db_i = reference.backward(dy, x, a[i], b[i], alpha_t[i], None, choice.options[i].spec)
            dx = dx + dx_i + dy @ weights[i]
            da.append(da_i)
            db.append(db_i)
    return dx.to(x.dtype), da, db


# --- the operators


def _or_nothing(tensors: list[Tensor | None], likes: list[Tensor]) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t, like in zip(tensors, likes, strict=True)]


def _forward_operator(x, weights, biases, a, b, alpha_t, *options):
    ys, zs = _forward_shared(x, weights, biases, a, b, alpha_t, _choice_of(x, b, *options))
    return [*ys, *_or_nothing(zs, [x] * len(zs))]


def _backward_operator(
    dys, x, weights, a, b, zs, alpha_t, activations, scalings, backend, need_dx, need_da, need_db
):  # fmt: skip
    choice = _choice_of(x, b, activations, scalings, True, backend)
    dx, da, db = _backward_shared(dys, x, weights, a, b, zs, alpha_t, choice, need_dx, need_da, need_db)
    return _or_nothing([dx, *da, *db], [x, *a, *b])


def _fake_forward(x, weights, biases, a, b, alpha_t, activations, scalings, save_z, backend):
    m = x.shape[0]
    ys = [x.new_empty(m, w.shape[0]) for w in weights]
    return [*ys, *(x.new_empty((m, a_i.shape[0]) if save_z else 0) for a_i in a)]


def _fake_backward(
    dys, x, weights, a, b, zs, alpha_t, activations, scalings, backend, need_dx, need_da, need_db
):  # fmt: skip
    given = [dy is not None for dy in dys]
    wanted = [
        (x, need_dx and any(given)),
        *((t, need and g) for t, need, g in zip(a, need_da, given, strict=True)),
        *((t, need and g) for t, need, g in zip(b, need_db, given, strict=True)),
    ]
    return [torch.empty(t.shape if needed else 0, dtype=t.dtype, device=t.device) for t, needed in wanted]


_defined_forward = ops.define(
    "forward_shared",
    f"(Tensor x, Tensor[] weights, Tensor?[] biases, {_MEMBERS}, bool save_z, str? backend) -> Tensor[]",
    _forward_operator,
    _fake_forward,
)
_defined_backward = ops.define(
    "backward_shared",
    "(Tensor?[] dys, Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] zs, "
    "Tensor?[] alpha_t, str[] activations, float[] scalings, str? backend, bool need_dx, "
    "bool[] need_da, bool[] need_db) -> Tensor[]",
    _backward_operator,
    _fake_backward,
)


def forward_shared(direct: bool, x, weights, biases, a, b, alpha_t, choice: Choice):
    """Return every y and every z."""
    operands = (x, weights, biases, a, b, alpha_t)
    if direct:
        return _forward_shared(*operands, choice)
    results = _defined_forward(*operands, *_specs(choice), choice.options[0].save_z, choice.requested)
    n = len(results) // 2
    return results[:n], results[n:]


def backward_shared(direct: bool, dys, x, weights, a, b, zs, alpha_t, choice: Choice, need_dx, need_da, need_db):
    """Return dx, every da and every db."""
    operands, needs = (dys, x, weights, a, b, zs, alpha_t), (need_dx, need_da, need_db)
    if direct:
        return _backward_shared(*operands, choice, *needs)
    dx, *results = _defined_backward(*operands, *_specs(choice), choice.requested, *needs)
    n = len(results) // 2
    return dx, results[:n], results[n:]


def _specs(choice: Choice) -> tuple[list[str], list[float]]:
    return [o.spec.activation for o in choice.options], [o.spec.scaling for o in choice.options]
