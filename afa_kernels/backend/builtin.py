"""Registers the backends in the order of choice; ``reference`` and ``torch`` can take any call."""

from afa_kernels.backend import choice, cpu, cuda, reference
from afa_kernels.backend import torch as torch_backend
from afa_kernels.backend.triton import backend as triton

for _backend in (
    cuda.BACKEND,
    triton.BACKEND,
    cpu.BACKEND,
    torch_backend.BACKEND,
    reference.BACKEND,
):
    choice.register(_backend)
