"""The ``reference`` backend: afa_kernels/reference.py as a backend, for any call."""

from functools import partial

import torch

from afa_kernels import reference
from afa_kernels.backend import group_loop
from afa_kernels.backend.registry import Backend, BackendStatus


def forward(x, a, b, alpha_t, seed, spec, *, base, out, save_z, first_row=0):
    y, z = reference.forward(x, a, b, alpha_t, seed, spec, base, first_row)
    out.copy_(y)
    return z if save_z else None


def backward(dy, x, a, b, z, alpha_t, seed, spec, *, need_dx, need_da, need_db, first_row=0):
    dx, da, db = reference.backward(dy, x, a, b, alpha_t, seed, spec, first_row)
    return dx if need_dx else None, da if need_da else None, db if need_db else None


BACKEND = Backend(
    name="reference",
    devices=frozenset(),
    status=lambda: BackendStatus(True, details={"torch": torch.__version__}),
    forward=forward,
    backward=backward,
    ragged_forward=partial(group_loop.forward, forward),
    ragged_backward=partial(group_loop.backward, backward),
)
