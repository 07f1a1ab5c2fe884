"""Ragged calls of the ``cuda`` backend: rows sorted by group, each group with its own A and B.

As in cuda.py, this allocates and the native module (csrc/cuda/bind_ragged.cpp) reads tensors where they lie; what it
cannot read is copied. Nothing here looks at the values of the groups, so that nothing waits for the device.
"""

from torch import Tensor

from afa_kernels.activation import COMPILED_IDS
from afa_kernels.backend.cuda_operands import readable, readable_base, readable_out, readable_weight, readable_z
from afa_kernels.backend.registry import Groups
from afa_kernels.options import Spec


def _described(a: Tensor, b: Tensor, groups: Groups, spec: Spec) -> tuple[tuple, tuple]:
    return (a, b, COMPILED_IDS[spec.activation]), (*groups, spec.scaling)


class RaggedKernels:
    """The ``ragged_forward`` and ``ragged_backward`` of the kernels of a native module (``cuda._Kernels``)."""

    def ragged_forward(self, x, a, b, groups: Groups, seed, spec: Spec, *, base, out, save_z):
        z = x.new_empty(x.shape[0], a.shape[1]) if save_z else None
        described = _described(a, b, groups, spec)
        if self._module.ragged_forward(x, *described, (base, out, z), seed, spec.dropout, *self._place(x)):
            return z
        y = readable_out(out)
        a, b = readable_weight(a, x), readable_weight(b, x)
        own_base = readable_base(base, out, y)
        z = self.ragged_forward(readable(x), a, b, groups, seed, spec, base=own_base, out=y, save_z=save_z)
        if y is not out:
            out.copy_(y)
        return z

    def ragged_backward(self, dy, x, a, b, groups: Groups, z, seed, spec: Spec, *, need_dx, need_da, need_db):
        (m, k), (count, n, r) = x.shape, b.shape
        dx = x.new_empty(m, k) if need_dx else None
        da = a.new_empty(count, r, k) if need_da else None
        db = b.new_empty(count, n, r) if need_db else None
        workspace = x.new_empty(self._module.ragged_workspace((m, k, n, r)) // x.element_size())
        gradients, described = (dy, z, dx, da, db), _described(a, b, groups, spec)
        if self._module.ragged_backward(x, *described, gradients, seed, spec.dropout, workspace, *self._place(x)):
            return dx, da, db
        dx, da, db = self.ragged_backward(
            readable(dy), readable(x), readable_weight(a, x), readable_weight(b, x), groups,
            None if z is None else readable_z(z), seed, spec, need_dx=need_dx, need_da=need_da, need_db=need_db,
        )  # fmt: skip
        return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype)
