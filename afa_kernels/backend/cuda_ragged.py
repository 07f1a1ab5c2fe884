"""Ragged calls of the ``cuda`` backend: rows sorted by group, each group with its own A and B.

As in cuda.py, this allocates and the native module (csrc/cuda/bind_ragged.cpp) reads tensors where they lie; what it
cannot read is copied. Nothing here looks at the values of the groups, so that nothing waits for the device.
"""

from functools import lru_cache
from types import ModuleType

from torch import Tensor

from afa_kernels.activation import COMPILED_IDS
from afa_kernels.backend.cuda_operands import readable, readable_base, readable_out, readable_weight, readable_z
from afa_kernels.backend.registry import Groups
from afa_kernels.options import Spec


def _described(a: Tensor, b: Tensor, groups: Groups, spec: Spec) -> tuple[tuple, tuple]:
    return (a, b, COMPILED_IDS[spec.activation]), (*groups, spec.scaling)


@lru_cache(maxsize=1024)
def _forward_workspace(module: ModuleType, sizes: tuple, count: int) -> int:
    return module.ragged_forward_workspace(sizes, count)


@lru_cache(maxsize=1024)
def _backward_workspace(module: ModuleType, sizes: tuple, count: int, recompute_z: bool) -> int:
    return module.ragged_backward_workspace(sizes, count, recompute_z)


class RaggedKernels:
    """The ``ragged_forward`` and ``ragged_backward`` of the kernels of a native module (``cuda._Kernels``)."""

    def ragged_forward(self, x, a, b, groups: Groups, seed, spec: Spec, *, base, out, save_z):
        (m, k), (count, n, r) = x.shape, b.shape
        z = x.new_empty(m, r) if save_z else None
        size = _forward_workspace(self._module, (m, k, n, r), count)
        workspace = x.new_empty(size // x.element_size()) if size else None
        call = (x, *_described(a, b, groups, spec), (base, out, z), seed, spec.dropout, workspace, *self._place(x))
        if self._module.ragged_forward(*call):
            return z
        y = readable_out(out)
        a, b = readable_weight(a, x), readable_weight(b, x)
        own_base = readable_base(base, out, y)
        z = self.ragged_forward(readable(x), a, b, groups, seed, spec, base=own_base, out=y, save_z=save_z)
        if y is not out:
            out.copy_(y)
        return z

    def ragged_backward(self, dy, x, a, b, groups: Groups, z, seed, spec: Spec, *, need_dx, need_da, need_db, dx=None):
        (m, k), (count, n, r) = x.shape, b.shape
        adds_dx = dx is not None
        if need_dx and not adds_dx:
            dx = x.new_empty(m, k)
        da = a.new_empty(count, r, k) if need_da else None
        db = b.new_empty(count, n, r) if need_db else None
        size = _backward_workspace(self._module, (m, k, n, r), count, z is None)
        workspace, gradients = x.new_empty(size // x.element_size()), (dy, z, dx, adds_dx, da, db)
        call = (x, *_described(a, b, groups, spec), gradients, seed, spec.dropout, workspace, *self._place(x))
        if self._module.ragged_backward(*call):
            return dx, da, db
        dx, da, db = self.ragged_backward(
            readable(dy), readable(x), readable_weight(a, x), readable_weight(b, x), groups,
            None if z is None else readable_z(z), seed, spec, need_dx=need_dx, need_da=need_da, need_db=need_db,
            dx=dx if adds_dx else None,
        )  # fmt: skip
        return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype)
