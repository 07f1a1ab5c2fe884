"""Registers the backends in the order of choice; ``reference`` and ``torch`` can take any call."""

from afa_kernels import reference
from afa_kernels.backend import cpu, registry, torch_ops

for _backend in (cpu.BACKEND, torch_ops.BACKEND, reference.BACKEND):
    registry.register(_backend)
