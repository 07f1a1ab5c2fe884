"""Fused Triton kernels, and plain torch, for AFA-LoRA, the LoRA whose activation anneals away.

The part of the package afa_kernels that needs no compilation: its functions and a stateless layer. The package itself
adds CPU and CUDA kernels, layers with parameters, PEFT, schedules and checkpoints.
"""

from . import layers
from .backend import builtin as _builtin  # noqa: F401 - registers the backends
from .backend.choice import backends, use_backend
from .backend.interface import BackendUnavailable
from .operator.activation import activations
from .operator.functional import afa_linear, afa_lora
from .operator.plan import plan

__all__ = ["BackendUnavailable", "activations", "afa_linear", "afa_lora", "backends", "layers", "plan", "use_backend"]
