"""The ``reference`` backend: operator/reference.py as a backend, for any call."""

from afa_kernels.backend.interface import Backend
from afa_kernels.operator import reference


class ReferenceBackend(Backend):
    name = "reference"

    def forward(self, x, a, b, alpha_t, seed, spec, rows=None, *, base, out, save_z):
        if rows is None:
            y, z = reference.forward(x, a, b, alpha_t, seed, spec, base)
        else:
            y, z = reference.forward_by_owner(x, a, b, alpha_t, seed, spec, rows, base)
        out.copy_(y)
        return z if save_z else None

    def backward(self, dy, x, a, b, z, alpha_t, seed, spec, rows=None, *, need_dx, need_da, need_db, dx=None):
        if rows is None:
            own_dx, da, db = reference.backward(dy, x, a, b, alpha_t, seed, spec)
        else:
            own_dx, da, db = reference.backward_by_owner(dy, x, a, b, alpha_t, seed, spec, rows)
        if need_dx:
            dx = own_dx if dx is None else dx.add_(own_dx)
        return dx, da if need_da else None, db if need_db else None


BACKEND = ReferenceBackend()
