"""The torch.library operators: schemas, fake kernels, and the one implementation that asks the
registry for a backend.

A torch device has one operator, whatever backend serves it, so torch.compile sees an opaque call
and never the choice. Operands are flat and already checked (checks.py); tensors that are not needed
come back with 0 elements, because an operator must return a fixed number of them. They run below
autograd: autograd.py gives them their derivative.
"""

import torch
from torch import Tensor

from afa_kernels.backend import linear, registry
from afa_kernels.backend.registry import IDENTITY, Call, Selection, Spec

NAMESPACE = "afa_kernels"
_BRANCH = (
    "Tensor x, Tensor lora_a, Tensor lora_b, Tensor alpha_t, Tensor? seed, "
    "str activation, float scaling, int dropout, str? backend"
)
_SAVED = (
    "Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? z, Tensor alpha_t, Tensor? seed, "
    "str activation, float scaling, int dropout, str? backend"
)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"lora_forward({_BRANCH}, bool save_z, Tensor? base) -> (Tensor y, Tensor z)")
_library.define(f"lora_forward_({_BRANCH}, bool save_z, Tensor(a!) base) -> Tensor z")
_library.define(
    f"linear_forward({_BRANCH}, bool save_z, Tensor weight, Tensor? bias) -> (Tensor y, Tensor z)"
)
_library.define(
    f"lora_backward({_SAVED}, bool need_dx, bool need_da, bool need_db)"
    " -> (Tensor dx, Tensor da, Tensor db)"
)
_library.define(
    f"linear_backward({_SAVED}, Tensor weight, bool need_da, bool need_db)"
    " -> (Tensor dx, Tensor da, Tensor db)"
)


def call_of(x: Tensor, a: Tensor, b: Tensor, activation: str, dropout: int) -> Call:
    device = x.device
    return Call(
        device.type,
        x.dtype,
        x.shape[0],
        x.shape[1],
        b.shape[0],
        a.shape[0],
        activation,
        dropout > 0,
        device.index,
    )


def choose(call: Call, backend: str | None) -> Selection:
    """Return the backend for ``call``: at identity plain GEMMs, unless a backend was asked for by
    name."""
    name = registry.requested(backend)
    if name is None and call.activation == IDENTITY:
        return Selection(registry.get("torch"), "alpha_t is 0: plain GEMMs")
    return registry.select(call, name)


class _PlainPrecision:
    """Switch autocast off inside an operator: its operands are rounded already, its float32 sums
    must stay float32."""

    def __init__(self, device_type: str):
        self._autocast = (
            torch.autocast(device_type, enabled=False)
            if torch.is_autocast_enabled(device_type)
            else None
        )

    def __enter__(self):
        if self._autocast is not None:
            self._autocast.__enter__()

    def __exit__(self, *exc):
        if self._autocast is not None:
            self._autocast.__exit__(*exc)


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device)


def _lora_forward(x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, base):
    y = torch.empty(x.shape[0], b.shape[0], dtype=x.dtype, device=x.device)
    z = _forward_into(
        y, x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, base
    )
    return y, z


def _lora_forward_(x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, base):
    return _forward_into(
        base, x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, base
    )


def _forward_into(out, x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, base):
    with _PlainPrecision(x.device.type):
        chosen = choose(call_of(x, a, b, activation, dropout), backend).backend
        if x.shape[0] == 0:
            return (
                torch.empty(0, a.shape[0], dtype=x.dtype, device=x.device)
                if save_z
                else _nothing(x)
            )
        spec = Spec(activation, scaling, dropout)
        z = chosen.forward(x, a, b, alpha_t, seed, spec, base=base, out=out, save_z=save_z)
    return _nothing(x) if z is None else z


def _linear_forward(
    x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, weight, bias
):
    with _PlainPrecision(x.device.type):
        chosen = choose(call_of(x, a, b, activation, dropout), backend).backend
        if x.shape[0] == 0:
            z = (
                torch.empty(0, a.shape[0], dtype=x.dtype, device=x.device)
                if save_z
                else _nothing(x)
            )
            return torch.empty(0, b.shape[0], dtype=x.dtype, device=x.device), z
        spec = Spec(activation, scaling, dropout)
        y, z = linear.linear_forward(
            chosen, x, weight, bias, a, b, alpha_t, seed, spec, save_z=save_z
        )
    return y, _nothing(x) if z is None else z


def _empty_gradients(x, a, b, need_dx, need_da, need_db):
    return (
        x.new_empty(x.shape) if need_dx else _nothing(x),
        a.new_zeros(a.shape) if need_da else _nothing(a),
        b.new_zeros(b.shape) if need_db else _nothing(b),
    )


def _filled(x, a, b, dx, da, db):
    return (
        _nothing(x) if dx is None else dx,
        _nothing(a) if da is None else da,
        _nothing(b) if db is None else db,
    )


def _lora_backward(
    dy, x, a, b, z, alpha_t, seed, activation, scaling, dropout, backend, need_dx, need_da, need_db
):
    if x.shape[0] == 0:
        return _empty_gradients(x, a, b, need_dx, need_da, need_db)
    with _PlainPrecision(x.device.type):
        chosen = choose(call_of(x, a, b, activation, dropout), backend).backend
        spec = Spec(activation, scaling, dropout)
        dx, da, db = chosen.backward(
            dy, x, a, b, z, alpha_t, seed, spec, need_dx=need_dx, need_da=need_da, need_db=need_db
        )
    return _filled(x, a, b, dx, da, db)


def _linear_backward(
    dy, x, a, b, z, alpha_t, seed, activation, scaling, dropout, backend, weight, need_da, need_db
):
    if x.shape[0] == 0:
        return _empty_gradients(x, a, b, True, need_da, need_db)
    with _PlainPrecision(x.device.type):
        chosen = choose(call_of(x, a, b, activation, dropout), backend).backend
        spec = Spec(activation, scaling, dropout)
        dx, da, db = linear.linear_backward(
            chosen, dy, x, weight, a, b, z, alpha_t, seed, spec, need_da=need_da, need_db=need_db
        )
    return _filled(x, a, b, dx, da, db)


def _fake_z(x, a, save_z):
    return x.new_empty((x.shape[0], a.shape[0]) if save_z else (0,))


def _fake_lora_forward(x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, base):
    return x.new_empty((x.shape[0], b.shape[0])), _fake_z(x, a, save_z)


def _fake_lora_forward_(
    x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, base
):
    return _fake_z(x, a, save_z)


def _fake_linear_forward(
    x, a, b, alpha_t, seed, activation, scaling, dropout, backend, save_z, weight, bias
):
    return x.new_empty((x.shape[0], b.shape[0])), _fake_z(x, a, save_z)


def _fake_gradients(x, a, b, need_dx, need_da, need_db):
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        a.new_empty(a.shape if need_da else (0,)),
        b.new_empty(b.shape if need_db else (0,)),
    )


def _fake_lora_backward(
    dy, x, a, b, z, alpha_t, seed, activation, scaling, dropout, backend, need_dx, need_da, need_db
):
    return _fake_gradients(x, a, b, need_dx, need_da, need_db)


def _fake_linear_backward(
    dy, x, a, b, z, alpha_t, seed, activation, scaling, dropout, backend, weight, need_da, need_db
):
    return _fake_gradients(x, a, b, True, need_da, need_db)


for _name, _implementation, _fake in (
    ("lora_forward", _lora_forward, _fake_lora_forward),
    ("lora_forward_", _lora_forward_, _fake_lora_forward_),
    ("linear_forward", _linear_forward, _fake_linear_forward),
    ("lora_backward", _lora_backward, _fake_lora_backward),
    ("linear_backward", _linear_backward, _fake_linear_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

lora_forward = torch.ops.afa_kernels.lora_forward.default
lora_forward_ = torch.ops.afa_kernels.lora_forward_.default
linear_forward = torch.ops.afa_kernels.linear_forward.default
lora_backward = torch.ops.afa_kernels.lora_backward.default
linear_backward = torch.ops.afa_kernels.linear_backward.default
