"""Registers the backends in the order of choice; ``reference`` and ``torch`` can take any call."""

from . import choice, reference
from . import torch as torch_backend
from .triton import backend as triton

for _backend in (triton.BACKEND, torch_backend.BACKEND, reference.BACKEND):
    choice.register(_backend)
