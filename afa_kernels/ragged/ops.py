"""The torch.library operators of ragged calls, built as those of _ops.py are."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from afa_kernels import _ops
from afa_kernels.backend import registry
from afa_kernels.backend.registry import Call, Groups, remembered
from afa_kernels.options import Options, Spec
from afa_kernels.ragged import frozen

_GROUPS = "Tensor offsets, Tensor? ranks, Tensor? alpha_t, Tensor? scalings"
_BRANCH = f"Tensor x, Tensor lora_a, Tensor lora_b, {_GROUPS}, Tensor? seed, {_ops.OPTIONS}"
_SAVED = f"Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, {_GROUPS}, Tensor? z, Tensor? seed, {_ops.OPTIONS}"


# --- the choice of a backend


def call_of(x: Tensor, b: Tensor, spec: Spec) -> Call:
    return _call(x.device, x.dtype, *x.shape, *b.shape, spec)


def _call(device: torch.device, dtype: torch.dtype, m: int, k: int, groups: int, n: int, r: int, spec: Spec) -> Call:
    return Call(device.type, dtype, m, k, n, r, spec.activation, spec.dropout > 0, device.index, groups)


def resolved(x: Tensor, b: Tensor, options: Options, identity: bool, differentiated: bool) -> Options:
    """:func:`afa_kernels._ops.resolved` for a ragged call."""
    if is_compiling():
        return _ops.decided(options, identity, differentiated, registry.requested_in_trace(options.backend))
    name = registry.requested(options.backend)
    return _resolved(x.device, x.dtype, *x.shape, *b.shape, options, identity, differentiated, name)


@remembered
def _resolved(device, dtype, m, k, groups, n, r, options, identity, differentiated, name) -> Options:
    spec, save_z, name = _ops.decided(options, identity, differentiated, name)
    return Options(spec, save_z, registry.select(_call(device, dtype, m, k, groups, n, r, spec), name).backend.name)


# --- the implementations


def _lora_forward(base, x, a, b, *rest):
    y = x.new_empty(x.shape[0], b.shape[1])
    return y, _write_branch(y, base, x, a, b, *rest)


def _lora_forward_(base, x, a, b, *rest):
    z = _write_branch(base, base, x, a, b, *rest)
    if not base.is_inference():  # such a tensor has no version
        torch.autograd.graph.increment_version(base)
    return z


def _write_branch(out, base, x, a, b, offsets, ranks, alpha_t, scalings, seed, options):
    if x.shape[0] == 0:
        return x.new_empty(0, a.shape[1]) if options.save_z else None
    with _ops.plain_precision(x):
        groups = Groups(offsets, ranks, alpha_t, scalings)
        forward = registry.get(options.backend).ragged_forward
        return forward(x, a, b, groups, seed, options.spec, base=base, out=out, save_z=options.save_z)


def _linear_forward(weight, bias, x, a, b, offsets, *rest):
    options: Options = rest[-1]
    if x.shape[0] == 0:
        return x.new_empty(0, b.shape[1]), x.new_empty(0, a.shape[1]) if options.save_z else None
    with _ops.plain_precision(x):
        return frozen.forward(
            registry.get(options.backend), options.spec, x, offsets, weight, bias,
            lambda base, out: _write_branch(out, base, x, a, b, offsets, *rest),
        )  # fmt: skip


def _lora_backward(
    dy, x, a, b, offsets, ranks, alpha_t, scalings, z, seed, options, need_dx, need_da, need_db, dx=None
):
    if x.shape[0] == 0:
        return _ops.gradients_of_no_rows(x, a, b, need_dx, need_da, need_db)
    with _ops.plain_precision(x):
        groups = Groups(offsets, ranks, alpha_t, scalings)
        needs = {"need_dx": need_dx, "need_da": need_da, "need_db": need_db}
        into = {} if dx is None else {"dx": dx}
        backward = registry.get(options.backend).ragged_backward
        return backward(dy, x, a, b, groups, z, seed, options.spec, **needs, **into)


def _linear_backward(weight, dy, x, a, b, offsets, *rest):
    *rest, options, need_da, need_db = rest
    with _ops.plain_precision(x):
        return frozen.backward(
            registry.get(options.backend), options.spec, dy, offsets, weight,
            lambda dx: _lora_backward(dy, x, a, b, offsets, *rest, options, True, need_da, need_db, dx),
        )  # fmt: skip


# --- the fake kernels: shapes and dtypes of the results


def _fake_z(x, a, save_z):
    return x.new_empty((x.shape[0], a.shape[1]) if save_z else 0)


def _fake_forward(x, a, b, save_z):
    return x.new_empty(x.shape[0], b.shape[1]), _fake_z(x, a, save_z)


def _fake_lora_forward(base, x, a, b, *options):
    return _fake_forward(x, a, b, options[-2])


def _fake_lora_forward_(base, x, a, b, *options):
    return _fake_z(x, a, options[-2])


def _fake_linear_forward(weight, bias, x, a, b, *options):
    return _fake_forward(x, a, b, options[-2])


def _fake_lora_backward(dy, x, a, b, *options):
    return _ops.fake_gradients(x, a, b, *options[-3:])


def _fake_linear_backward(weight, dy, x, a, b, *options):
    return _ops.fake_gradients(x, a, b, True, *options[-2:])


def _fake_outer(left, right, offsets):
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


# --- the operators


outer = _ops.define("ragged_outer", "(Tensor left, Tensor right, Tensor offsets) -> Tensor", frozen.outer, _fake_outer)


def _define(name: str, signature: str, implementation, fake, **places):
    return _ops.define_direct(name, signature, implementation, fake, call_of=call_of, **places)


lora_forward = _define(
    "ragged_lora_forward",
    f"(Tensor? base, {_BRANCH}) -> (Tensor y, Tensor z)",
    _lora_forward,
    _fake_lora_forward,
    tensors=9,
    x=1,
    likes=(1, 1),
)
lora_forward_ = _define(
    "ragged_lora_forward_",
    f"(Tensor(a!) base, {_BRANCH}) -> Tensor z",
    _lora_forward_,
    _fake_lora_forward_,
    tensors=9,
    x=1,
    likes=(1,),
)
linear_forward = _define(
    "ragged_linear_forward",
    f"(Tensor weight, Tensor? bias, {_BRANCH}) -> (Tensor y, Tensor z)",
    _linear_forward,
    _fake_linear_forward,
    tensors=10,
    x=2,
    likes=(2, 2),
)
lora_backward = _define(
    "ragged_lora_backward",
    f"({_SAVED}, bool need_dx, bool need_da, bool need_db) -> {_ops.GRADIENTS}",
    _lora_backward,
    _fake_lora_backward,
    tensors=10,
    x=1,
    likes=(1, 2, 3),
)
linear_backward = _define(
    "ragged_linear_backward",
    f"(Tensor weight, {_SAVED}, bool need_da, bool need_db) -> {_ops.GRADIENTS}",
    _linear_backward,
    _fake_linear_backward,
    tensors=11,
    x=2,
    likes=(2, 3, 4),
)
