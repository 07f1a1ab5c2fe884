"""The operators of layers that share their input: all branches in one pass over x where one backend takes them together
(``registry.select_group``), else layer by layer.

As in _ops.py, each operator has a function of its name with ``direct`` as its first argument. A list has one entry for
each member. What is not needed is None in what a direct call returns, and a tensor with 0 elements in what the operator
returns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from afa_kernels import _ops, reference
from afa_kernels.activation import IDENTITY
from afa_kernels.backend import frozen, registry
from afa_kernels.backend.registry import Backend, Call, Member, remembered
from afa_kernels.options import Options, Spec
from afa_kernels.reference import compute_dtype

_MEMBERS = "Tensor[] lora_a, Tensor[] lora_b, Tensor[] alpha_t, str[] activations, float[] scalings"


class _Choice(NamedTuple):
    """Who computes a group: one backend for all members, or None and each by itself with its own options."""

    together: Backend | None
    options: list[Options]


def _choice(x, b, activations, scalings, save_z, name) -> _Choice:
    shapes = tuple([b_i.shape for b_i in b])
    return _choice_for(x.device, x.dtype, x.shape, shapes, tuple(activations), tuple(scalings), save_z, name)


@remembered
def _choice_for(device, dtype, rows, shapes, activations, scalings, save_z, name) -> _Choice:
    calls, options = [], []
    for shape, activation, scaling in zip(shapes, activations, scalings, strict=True):
        calls.append(Call(device.type, dtype, *rows, *shape, activation, False, device.index))
        options.append(Options(Spec(activation, scaling), save_z, registry.select(calls[-1], name).backend.name))
    return _Choice(registry.select_group(tuple(calls), name)[0], options)


def _member(a: Tensor, b: Tensor, alpha_t: Tensor, options: Options) -> Member:
    return Member(a, b, None if options.spec.activation == IDENTITY else alpha_t, options.spec)


# --- the implementations


def _group_forward(x, weights, biases, a, b, alpha_t, activations, scalings, save_z, backend):
    """Return every y and every z."""
    if x.shape[0] == 0:
        return [x.new_empty(0, b_i.shape[0]) for b_i in b], [x.new_empty(0, a_i.shape[0]) for a_i in a]
    together, options = _choice(x, b, activations, scalings, save_z, backend)
    members = list(map(_member, a, b, alpha_t, options))
    layers = list(zip(weights, biases, strict=True))
    if together is None:
        results = [
            _ops.linear_forward(True, *layer, x, m.a, m.b, m.alpha_t, None, o)
            for layer, m, o in zip(layers, members, options, strict=True)
        ]
        return [y for y, _ in results], [z for _, z in results]

    def branches(bases: list[Tensor | None], outs: list[Tensor]) -> list[Tensor] | None:
        return together.group_forward(x, members, bases=bases, outs=outs, save_z=save_z)

    with _ops.plain_precision(x):
        ys, zs = frozen.forward(together, members[0].spec, x, layers, branches)
    return ys, zs if save_z else [None] * len(ys)


def _group_backward(
    dys, x, weights, a, b, zs, alpha_t, activations, scalings, backend, need_dx, need_da, need_db
):  # fmt: skip
    """Return dx, every da and every db. A member without dy adds nothing to dx, and its da and db are None."""
    da, db = [None] * len(a), [None] * len(b)
    given = [i for i, dy in enumerate(dys) if dy is not None]
    if not (need_dx or any(need_da[i] or need_db[i] for i in given)) or not given:
        return None, da, db
    together, options = _choice(x, b, activations, scalings, zs is not None, backend)
    members = list(map(_member, a, b, alpha_t, options))
    if x.shape[0] == 0:
        dx = torch.empty_like(x) if need_dx else None
        found = [
            [torch.zeros_like(t[i]) if need[i] else None for i in given] for t, need in ((a, need_da), (b, need_db))
        ]
    elif together is None:
        dx, *found = _one_by_one(dys, x, weights, members, options, zs, given, need_dx, need_da, need_db)
    else:
        dx, *found = _together(together, dys, x, weights, members, zs, given, need_dx, need_da, need_db)
    for i, da_i, db_i in zip(given, *found, strict=True):
        da[i], db[i] = da_i, db_i
    return dx, da, db


def _together(backend, dys, x, weights, members, zs, given, need_dx, need_da, need_db):
    def of_given(values: list) -> list:
        return [values[i] for i in given]

    dys, members, zs = of_given(dys), of_given(members), None if zs is None else of_given(zs)
    needs = {"need_dx": need_dx, "need_da": of_given(need_da), "need_db": of_given(need_db)}

    def branches(dx: Tensor | None):
        into = {} if dx is None else {"dx": dx}
        return backend.group_backward(dys, x, members, zs, **needs, **into)

    with _ops.plain_precision(x):
        if not need_dx:
            return branches(None)
        products = list(zip(dys, of_given(weights), strict=True))
        return frozen.backward(backend, members[0].spec, products, branches)


def _one_by_one(dys, x, weights, members, options, zs, given, need_dx, need_da, need_db):
    dx, da, db = None, [], []
    for i in given:
        m, z = members[i], None if zs is None else zs[i]
        saved = (dys[i], x, m.a, m.b, z, m.alpha_t, None, options[i])
        if need_dx:
            dx_i, da_i, db_i = _ops.linear_backward(True, weights[i], *saved, need_da[i], need_db[i])
            dx = dx_i if dx is None else dx.add_(dx_i)
        else:
            _, da_i, db_i = _ops.lora_backward(True, *saved, False, need_da[i], need_db[i])
        da.append(da_i)
        db.append(db_i)
    return dx, da, db


def differentiable_backward(dys, x, weights, a, b, alpha_t, activations, scalings):
    """Return dx, every da and every db as plain torch ops: the sum of the members' closed
    formulas."""
    dx, da, db = torch.zeros_like(x, dtype=compute_dtype(x.dtype)), [], []
    with _ops.plain_precision(x):
        for i, dy in enumerate(dys):
            if dy is None:
                da.append(None)
                db.append(None)
                continue
            spec = Spec(activations[i], scalings[i], 0)
            dx_i, da_i, db_i = reference.backward(dy, x, a[i], b[i], alpha_t[i], None, spec)
            dx = dx + dx_i + dy @ weights[i]
            da.append(da_i)
            db.append(db_i)
    return dx.to(x.dtype), da, db


# --- the operators


def _or_nothing(tensors: list[Tensor | None], likes: list[Tensor]) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t, like in zip(tensors, likes, strict=True)]


def _forward_operator(x, *arguments):
    ys, zs = _group_forward(x, *arguments)
    return [*ys, *_or_nothing(zs, [x] * len(zs))]


def _backward_operator(dys, x, weights, a, b, *arguments):
    dx, da, db = _group_backward(dys, x, weights, a, b, *arguments)
    return _or_nothing([dx, *da, *db], [x, *a, *b])


def _fake_group_forward(x, weights, biases, a, b, alpha_t, activations, scalings, save_z, backend):
    m = x.shape[0]
    ys = [x.new_empty(m, w.shape[0]) for w in weights]
    return [*ys, *(x.new_empty((m, a_i.shape[0]) if save_z else 0) for a_i in a)]


def _fake_group_backward(
    dys, x, weights, a, b, zs, alpha_t, activations, scalings, backend, need_dx, need_da, need_db
):  # fmt: skip
    given = [dy is not None for dy in dys]
    wanted = [
        (x, need_dx and any(given)),
        *((t, need and g) for t, need, g in zip(a, need_da, given, strict=True)),
        *((t, need and g) for t, need, g in zip(b, need_db, given, strict=True)),
    ]
    return [torch.empty(t.shape if needed else 0, dtype=t.dtype, device=t.device) for t, needed in wanted]


_defined_forward = _ops.define(
    "group_forward",
    f"(Tensor x, Tensor[] weights, Tensor?[] biases, {_MEMBERS}, bool save_z, str? backend) -> Tensor[]",
    _forward_operator,
    _fake_group_forward,
)
_defined_backward = _ops.define(
    "group_backward",
    "(Tensor?[] dys, Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[]? zs, "
    "Tensor[] alpha_t, str[] activations, float[] scalings, str? backend, bool need_dx, "
    "bool[] need_da, bool[] need_db) -> Tensor[]",
    _backward_operator,
    _fake_group_backward,
)


def group_forward(direct: bool, *arguments) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return every y and every z."""
    if direct:
        return _group_forward(*arguments)
    results = _defined_forward(*arguments)
    n = len(results) // 2
    return results[:n], results[n:]


def group_backward(direct: bool, *arguments) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Return dx, every da and every db."""
    if direct:
        return _group_backward(*arguments)
    dx, *results = _defined_backward(*arguments)
    n = len(results) // 2
    return dx, results[:n], results[n:]
