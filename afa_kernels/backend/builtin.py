"""Registers the backends in the order of choice; ``reference`` and ``torch`` can take any call."""

from afa_kernels import reference
from afa_kernels.backend import cpu, registry, torch_ops
from afa_kernels.backend.triton import backend as triton

for _backend in (triton.BACKEND, cpu.BACKEND, torch_ops.BACKEND, reference.BACKEND):
    registry.register(_backend)
