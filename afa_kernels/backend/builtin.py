"""Registers the backends in the order of choice; ``reference`` and ``torch`` can take any call."""

from afa_kernels.backend import cpu, cuda, oracle, registry, torch_ops
from afa_kernels.backend.triton import backend as triton

for _backend in (
    cuda.BACKEND,
    triton.BACKEND,
    cpu.BACKEND,
    torch_ops.BACKEND,
    oracle.BACKEND,
    cuda.EMULATED,
):
    registry.register(_backend)
