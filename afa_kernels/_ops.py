"""The torch.library operators: schemas, fake kernels, and the one implementation that asks the
registry for a backend.

A torch device has one operator, whatever backend serves it, so torch.compile sees an opaque call
and never the choice. Operands are flat and already checked (checks.py). They run below autograd:
autograd.py gives them their derivative.

Where the dispatcher would only pass a call on, it goes to the implementation straight away
(_direct.py). What is not needed comes back as None then; an operator has to return a fixed number
of tensors, and gives one with 0 elements.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from afa_kernels._direct import direct_or
from afa_kernels.backend import linear, registry
from afa_kernels.backend.registry import IDENTITY, Backend, Call, Selection, Spec, remembered

NAMESPACE = "afa_kernels"
_BRANCH = (
    "Tensor x, Tensor lora_a, Tensor lora_b, Tensor alpha_t, Tensor? seed, "
    "str activation, float scaling, int dropout, bool save_z, str? backend"
)
_SAVED = (
    "Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? z, Tensor alpha_t, Tensor? seed, "
    "str activation, float scaling, int dropout, str? backend"
)
_GRADIENTS = "(Tensor dx, Tensor da, Tensor db)"

_library = torch.library.Library(NAMESPACE, "DEF")
_no_context = nullcontext()


def call_of(x: Tensor, a: Tensor, b: Tensor, activation: str, dropout: int) -> Call:
    m, k = x.shape
    n, r = b.shape
    device = x.device
    return Call(device.type, x.dtype, m, k, n, r, activation, dropout > 0, device.index)


def choose(call: Call, name: str | None) -> Selection:
    """Return the backend for ``call``: plain GEMMs at identity, unless another was requested by ``name``."""
    if name is None and call.activation == IDENTITY:
        return Selection(registry.get("torch"), "alpha_t is 0: plain GEMMs")
    return registry.select(call, name)


def _chosen(x, a, b, activation, scaling, dropout, backend) -> tuple[Backend, Spec]:
    m, k = x.shape
    n, r = b.shape
    name = registry.requested(backend)
    return _choice(x.device, x.dtype, m, k, n, r, activation, scaling, dropout, name)


@remembered
def _choice(device, dtype, m, k, n, r, activation, scaling, dropout, name) -> tuple[Backend, Spec]:
    call = Call(device.type, dtype, m, k, n, r, activation, dropout > 0, device.index)
    return choose(call, name).backend, Spec(activation, scaling, dropout)


def plain_precision(x: Tensor) -> AbstractContextManager:
    """Switch autocast off inside an operator: its operands are rounded already, and its float32
    sums must stay float32."""
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return _no_context


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape)


def _or_nothing(t: Tensor | None, like: Tensor) -> Tensor:
    return _empty(like, 0) if t is None else t


def _lora_forward(base, x, a, b, *options):
    # empty_like takes half as long, and keeps the strides of base, which are not always those of a result.
    dense = base is not None and base.is_contiguous()
    y = torch.empty_like(base) if dense else _empty(x, x.shape[0], b.shape[0])
    return y, _write_branch(y, base, x, a, b, *options)


def _lora_forward_(base, x, a, b, *options):
    z = _write_branch(base, base, x, a, b, *options)
    if not base.is_inference():  # such a tensor has no version
        torch.autograd.graph.increment_version(base)
    return z


def _write_branch(out, base, x, a, b, alpha_t, seed, activation, scaling, dropout, save_z, backend):
    with plain_precision(x):
        chosen, spec = _chosen(x, a, b, activation, scaling, dropout, backend)
        if x.shape[0] == 0:
            return _empty(x, 0, a.shape[0]) if save_z else None
        return chosen.forward(x, a, b, alpha_t, seed, spec, base=base, out=out, save_z=save_z)


def _linear_forward(weight, bias, x, a, b, alpha_t, seed, activation, scaling, dropout, save_z, backend):
    with plain_precision(x):
        chosen, spec = _chosen(x, a, b, activation, scaling, dropout, backend)
        if x.shape[0] == 0:
            return _empty(x, 0, b.shape[0]), _empty(x, 0, a.shape[0]) if save_z else None
        return linear.linear_forward(chosen, x, weight, bias, a, b, alpha_t, seed, spec, save_z=save_z)


def _lora_backward(dy, x, a, b, z, alpha_t, seed, activation, scaling, dropout, backend, need_dx, need_da, need_db):
    if x.shape[0] == 0:
        return _gradients_of_no_rows(x, a, b, need_dx, need_da, need_db)
    with plain_precision(x):
        chosen, spec = _chosen(x, a, b, activation, scaling, dropout, backend)
        return chosen.backward(
            dy, x, a, b, z, alpha_t, seed, spec, need_dx=need_dx, need_da=need_da, need_db=need_db
        )  # fmt: skip


def _linear_backward(weight, dy, x, a, b, z, alpha_t, seed, activation, scaling, dropout, backend, need_da, need_db):
    if x.shape[0] == 0:
        return _gradients_of_no_rows(x, a, b, True, need_da, need_db)
    with plain_precision(x):
        chosen, spec = _chosen(x, a, b, activation, scaling, dropout, backend)
        return linear.linear_backward(
            chosen, dy, x, weight, a, b, z, alpha_t, seed, spec, need_da=need_da, need_db=need_db
        )  # fmt: skip


def _gradients_of_no_rows(x, a, b, need_dx, need_da, need_db):
    dx, da, db = _fake_gradients(x, a, b, need_dx, need_da, need_db)
    return dx, da.zero_(), db.zero_()


def _fake_z(x, a, save_z):
    return _empty(x, x.shape[0], a.shape[0]) if save_z else _empty(x, 0)


def _fake_forward(x, a, b, save_z):
    return _empty(x, x.shape[0], b.shape[0]), _fake_z(x, a, save_z)


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


def _define(name: str, signature: str, implementation, fake):
    """Define an operator and return it."""
    _library.define(f"{name}{signature}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.afa_kernels, name).default


def _define_direct(name: str, signature: str, implementation, fake, tensors: int, likes: tuple[int, ...]):
    """Define an operator and return the function that calls it or its implementation.

    Args:
        tensors: how many arguments, from the first on, are tensors or None.
        likes: for each result, the place of the argument whose dtype and device it has.
    """

    def operator(*arguments):
        results = implementation(*arguments)
        if not isinstance(results, tuple):
            return _or_nothing(results, arguments[likes[0]])
        return tuple(_or_nothing(t, arguments[like]) for t, like in zip(results, likes, strict=True))

    return direct_or(_define(name, signature, operator, fake), implementation, tensors)


lora_forward = _define_direct(
    "lora_forward",
    f"(Tensor? base, {_BRANCH}) -> (Tensor y, Tensor z)",
    _lora_forward,
    _fake_lora_forward,
    tensors=6,
    likes=(1, 1),
)
lora_forward_ = _define_direct(
    "lora_forward_",
    f"(Tensor(a!) base, {_BRANCH}) -> Tensor z",
    _lora_forward_,
    _fake_lora_forward_,
    tensors=6,
    likes=(1,),
)
linear_forward = _define_direct(
    "linear_forward",
    f"(Tensor weight, Tensor? bias, {_BRANCH}) -> (Tensor y, Tensor z)",
    _linear_forward,
    _fake_linear_forward,
    tensors=7,
    likes=(2, 2),
)
lora_backward = _define_direct(
    "lora_backward",
    f"({_SAVED}, bool need_dx, bool need_da, bool need_db) -> {_GRADIENTS}",
    _lora_backward,
    _fake_lora_backward,
    tensors=7,
    likes=(1, 2, 3),
)
linear_backward = _define_direct(
    "linear_backward",
    f"(Tensor weight, {_SAVED}, bool need_da, bool need_db) -> {_GRADIENTS}",
    _linear_backward,
    _fake_linear_backward,
    tensors=8,
    likes=(2, 3, 4),
)
