"""Registers the backends in the order of choice; ``reference`` and ``torch`` can take any call."""

from . import oracle, registry, torch_ops
from .triton import backend as triton

for _backend in (triton.BACKEND, torch_ops.BACKEND, oracle.BACKEND):
    registry.register(_backend)
