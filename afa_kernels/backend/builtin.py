"""Registers the backends in the order of choice; ``reference`` and ``torch`` can take any call."""

from afa_kernels import reference
from afa_kernels.backend import cuda, registry, torch_ops

for _backend in (cuda.BACKEND, torch_ops.BACKEND, reference.BACKEND, cuda.EMULATED):
    registry.register(_backend)
