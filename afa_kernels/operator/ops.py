"""The torch.library operators: schemas, fake kernels, and one implementation of each, which calls the backend.

A torch device has one operator, whatever backend serves it, so torch.compile sees an opaque call and never the choice.
Operands are flat and already checked (checks.py). They run below autograd: autograd.py gives them their derivative.

Each operator has a function of its name here. With ``direct`` it calls the implementation straight away: the
dispatcher takes a third of what a small call costs above its kernels, and several times as long where a large GEMM has
just emptied the caches. What is not needed comes back as None then; an operator has to return a fixed number of
tensors, and gives one with 0 elements.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.compiler import is_compiling

from afa_kernels import torch_private
from afa_kernels.backend import choice
from afa_kernels.backend.choice import remembered
from afa_kernels.backend.interface import Call, Rows
from afa_kernels.operator import frozen
from afa_kernels.operator.options import Options, Spec, at_identity

NAMESPACE = "afa_kernels"
_OPTIONS = "str activation, float scaling, int dropout, bool save_z, str? backend"
_ROWS = "Tensor? offsets, Tensor? ranks, Tensor? scalings"  # a Rows, or None three times
_GRADIENTS = "(Tensor dx, Tensor da, Tensor db)"

_library = torch.library.Library(NAMESPACE, "DEF")
_no_context = nullcontext()


# --- the choice of a backend


def call_of(x: Tensor, b: Tensor, spec: Spec) -> Call:
    """Return the call that a backend is chosen for; ``b`` is ``(N, r)``, or ``(G, N, r)`` where rows have owners."""
    return _call(x.device, x.dtype, x.shape, b.shape, spec)


def _call(device: torch.device, dtype: torch.dtype, rows: torch.Size, shape: torch.Size, spec: Spec) -> Call:
    owners = shape[0] if len(shape) == 3 else 0
    sizes = (*rows, *shape[-2:])
    return Call(device.type, dtype, *sizes, spec.activation, spec.dropout > 0, device.index, owners)


def resolved(x: Tensor, b: Tensor, options: Options, identity: bool, differentiated: bool) -> Options:
    """Return ``options`` with all decided that the operands decide: identity, whether a backward may want z, and the
    backend of forward and backward.

    In a trace the backend stays None unless one was requested: the operators choose it when they run, by the same rule
    in both directions.
    """
    if is_compiling():
        return _decided(options, identity, differentiated, choice.requested_in_trace(options.backend))
    name = choice.requested(options.backend)
    return _resolved(x.device, x.dtype, x.shape, b.shape, options, identity, differentiated, name)


@remembered
def _resolved(device, dtype, rows, shape, options, identity, differentiated, name) -> Options:
    spec, save_z, name = _decided(options, identity, differentiated, name)
    return Options(spec, save_z, choice.select(_call(device, dtype, rows, shape, spec), name).backend.name)


def _decided(options: Options, identity: bool, differentiated: bool, name: str | None) -> Options:
    options = at_identity(options) if identity else options
    return Options(options.spec, options.save_z and differentiated, name)


# --- the implementations


def plain_precision(x: Tensor) -> AbstractContextManager:
    """Switch autocast off inside an operator: its operands are rounded already, and its float32
    sums must stay float32."""
    if torch_private.autocast_may_be_on() and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return _no_context


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape)


def _write_branch(out, base, x, a, b, alpha_t, seed, options, rows):
    if x.shape[0] == 0:
        return _empty(x, 0, a.shape[-2]) if options.save_z else None
    with plain_precision(x):
        forward = choice.get(options.backend).forward
        return forward(x, a, b, alpha_t, seed, options.spec, rows, base=base, out=out, save_z=options.save_z)


def _lora_forward(base, x, a, b, *rest):
    # empty_like takes half the time of new_empty. It copies the strides of base, so it serves for a contiguous one.
    dense = base is not None and base.is_contiguous()
    y = torch.empty_like(base) if dense else _empty(x, x.shape[0], b.shape[-2])
    return y, _write_branch(y, base, x, a, b, *rest)


def _lora_forward_(base, *rest):
    z = _write_branch(base, base, *rest)
    if not base.is_inference():  # such a tensor has no version
        torch.autograd.graph.increment_version(base)
    return z


def _linear_forward(weight, bias, x, a, b, alpha_t, seed, options, rows):
    if x.shape[0] == 0:
        return _empty(x, 0, b.shape[-2]), _empty(x, 0, a.shape[-2]) if options.save_z else None
    with plain_precision(x):
        backend, spec = choice.get(options.backend), options.spec
        if rows is not None and backend.multiplies(x, weight, a.shape[-2]):
            branch = (a, b, alpha_t, seed, spec, rows)
            return backend.linear_forward(x, weight, bias, *branch, save_z=options.save_z)
        y, base, product_to_come = frozen.begin(backend, spec, x, weight, bias, rows)
        z = backend.forward(x, a, b, alpha_t, seed, spec, rows, base=base, out=y, save_z=options.save_z)
        if product_to_come:
            frozen.finish(y, x, weight, rows)
        return y, z


def _lora_backward(dy, x, a, b, z, alpha_t, seed, options, rows, need_dx, need_da, need_db):
    if x.shape[0] == 0:
        return gradients_of_no_rows(x, a, b, need_dx, need_da, need_db)
    with plain_precision(x):
        needs = {"need_dx": need_dx, "need_da": need_da, "need_db": need_db}
        return choice.get(options.backend).backward(dy, x, a, b, z, alpha_t, seed, options.spec, rows, **needs)


def _linear_backward(weight, dy, x, a, b, z, alpha_t, seed, options, rows, need_da, need_db):
    if x.shape[0] == 0:
        return gradients_of_no_rows(x, a, b, True, need_da, need_db)
    with plain_precision(x):
        backend, spec = choice.get(options.backend), options.spec
        needs = {"need_da": need_da, "need_db": need_db}
        if rows is not None and backend.multiplies(dy, weight, a.shape[-2]):
            return backend.linear_backward(dy, x, weight, a, b, z, alpha_t, seed, spec, rows, **needs)
        needs["need_dx"] = True
        begun = frozen.begin_backward(backend, spec, dy, weight, rows)
        if begun is not None:
            needs["dx"] = begun
        dx, da, db = backend.backward(dy, x, a, b, z, alpha_t, seed, spec, rows, **needs)
        if begun is None:
            frozen.finish_backward(dx, dy, weight, rows)
        return dx, da, db


def gradients_of_no_rows(x, a, b, need_dx, need_da, need_db):
    dx, da, db = _fake_gradients(x, a, b, need_dx, need_da, need_db)
    return dx, da.zero_(), db.zero_()


# --- the fake kernels: shapes and dtypes of the results


def _fake_z(x, a, save_z):
    return _empty(x, x.shape[0], a.shape[-2]) if save_z else _empty(x, 0)


def _fake_forward(x, a, b, save_z):
    return _empty(x, x.shape[0], b.shape[-2]), _fake_z(x, a, save_z)


def _fake_gradients(x, a, b, need_dx, need_da, need_db):
    return tuple(
        _empty(t, *t.shape) if needed else _empty(t, 0) for t, needed in ((x, need_dx), (a, need_da), (b, need_db))
    )


def _fake_lora_forward(base, x, a, b, *options):
    return _fake_forward(x, a, b, options[-2])


def _fake_lora_forward_(base, x, a, b, *options):
    return _fake_z(x, a, options[-2])


def _fake_linear_forward(weight, bias, x, a, b, *options):
    return _fake_forward(x, a, b, options[-2])


def _fake_lora_backward(dy, x, a, b, *options):
    return _fake_gradients(x, a, b, *options[-3:])


def _fake_linear_backward(weight, dy, x, a, b, *options):
    return _fake_gradients(x, a, b, True, *options[-2:])


# --- the operators


def define(name: str, signature: str, implementation, fake):
    """Define an operator and return it."""
    _library.define(f"{name}{signature}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _define_direct(name: str, signature: str, implementation, fake, tensors: int, x: int, likes: tuple[int, ...]):
    """Define an operator and return the function ``call(direct, *tensors, options, rows, *needs)`` that stands for it.

    Args:
        tensors: how many arguments, from the first on, are tensors or None, those of rows not counted.
        x: the place of x among them; A and B follow it.
        likes: for each result, the place of the argument whose dtype and device it has.
    """

    def operator(*arguments):
        operands, (offsets, ranks, scalings, *chosen) = arguments[:tensors], arguments[tensors:]
        activation, scaling, dropout, save_z, backend, *needs = chosen
        options = Options(Spec(activation, scaling, dropout), save_z, backend)
        rows = None if offsets is None else Rows(offsets, ranks, scalings)
        selected = choice.select(call_of(operands[x], operands[x + 2], options.spec), backend)
        results = implementation(*operands, options._replace(backend=selected.backend.name), rows, *needs)
        if not isinstance(results, tuple):
            return _or_nothing(results, arguments[likes[0]])
        return tuple(_or_nothing(t, arguments[like]) for t, like in zip(results, likes, strict=True))

    defined = define(name, signature, operator, fake)

    def call(direct: bool, *arguments):
        if direct:
            return implementation(*arguments)
        options, rows, *needs = arguments[tensors:]
        owned = (None, None, None) if rows is None else rows
        return defined(*arguments[:tensors], *owned, *options.spec, options.save_z, options.backend, *needs)

    return call


def _or_nothing(t: Tensor | None, like: Tensor) -> Tensor:
    return _empty(like, 0) if t is None else t


_BRANCH = f"Tensor x, Tensor lora_a, Tensor lora_b, Tensor? alpha_t, Tensor? seed, {_ROWS}, {_OPTIONS}"
_SAVED = (
    f"Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, Tensor z, Tensor? alpha_t, Tensor? seed, {_ROWS}, {_OPTIONS}"
)
lora_forward = _define_direct(
    "lora_forward", f"(Tensor? base, {_BRANCH}) -> (Tensor y, Tensor z)", _lora_forward, _fake_lora_forward,
    tensors=6, x=1, likes=(1, 1),
)  # fmt: skip
lora_forward_ = _define_direct(
    "lora_forward_", f"(Tensor(a!) base, {_BRANCH}) -> Tensor z", _lora_forward_, _fake_lora_forward_,
    tensors=6, x=1, likes=(1,),
)  # fmt: skip
linear_forward = _define_direct(
    "linear_forward", f"(Tensor weight, Tensor? bias, {_BRANCH}) -> (Tensor y, Tensor z)", _linear_forward,
    _fake_linear_forward, tensors=7, x=2, likes=(2, 2),
)  # fmt: skip
lora_backward = _define_direct(
    "lora_backward", f"({_SAVED}, bool need_dx, bool need_da, bool need_db) -> {_GRADIENTS}", _lora_backward,
    _fake_lora_backward, tensors=7, x=1, likes=(1, 2, 3),
)  # fmt: skip
linear_backward = _define_direct(
    "linear_backward", f"(Tensor weight, {_SAVED}, bool need_da, bool need_db) -> {_GRADIENTS}", _linear_backward,
    _fake_linear_backward, tensors=8, x=2, likes=(2, 3, 4),
)  # fmt: skip


def _fake_outer(left, right, offsets):
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


outer = define("outer", "(Tensor left, Tensor right, Tensor offsets) -> Tensor", frozen.outer, _fake_outer)
