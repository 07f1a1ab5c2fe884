"""The torch.library operators of ragged calls, defined as those of _ops.py are."""

from afa_kernels import _ops
from afa_kernels.backend import registry
from afa_kernels.backend.registry import Groups
from afa_kernels.options import Options
from afa_kernels.ragged import frozen


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
    dy, x, a, b, z, offsets, ranks, alpha_t, scalings, seed, options, need_dx, need_da, need_db, dx=None
):
    if x.shape[0] == 0:
        return _ops.gradients_of_no_rows(x, a, b, need_dx, need_da, need_db)
    with _ops.plain_precision(x):
        groups = Groups(offsets, ranks, alpha_t, scalings)
        needs = {"need_dx": need_dx, "need_da": need_da, "need_db": need_db}
        into = {} if dx is None else {"dx": dx}
        backward = registry.get(options.backend).ragged_backward
        return backward(dy, x, a, b, groups, z, seed, options.spec, **needs, **into)


def _linear_backward(weight, dy, x, a, b, z, offsets, *rest):
    *rest, options, need_da, need_db = rest
    if x.shape[0] == 0:
        return _ops.gradients_of_no_rows(x, a, b, True, need_da, need_db)
    with _ops.plain_precision(x):
        return frozen.backward(
            registry.get(options.backend), options.spec, dy, offsets, weight,
            lambda dx: _lora_backward(dy, x, a, b, z, offsets, *rest, options, True, need_da, need_db, dx),
        )  # fmt: skip


def _fake_outer(left, right, offsets):
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


outer = _ops.define("ragged_outer", "(Tensor left, Tensor right, Tensor offsets) -> Tensor", frozen.outer, _fake_outer)
lora_forward, lora_forward_, linear_forward, lora_backward, linear_backward = _ops.define_operators(
    "ragged_", "Tensor offsets, Tensor? ranks, Tensor? alpha_t, Tensor? scalings",
    _write_branch, _linear_forward, _lora_backward, _linear_backward,
)  # fmt: skip
