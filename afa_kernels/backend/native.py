"""Finds the compiled module ``afa_kernels._C``. Import never fails: the error is kept for whoever asks for a kernel.

What Python does slowly and every call needs is done by the module where there is one.
"""

import importlib
import os
from types import ModuleType

import torch

from afa_kernels import torch_private

_C: ModuleType | None = None
load_error = ""
try:
    _C = importlib.import_module("afa_kernels._C")
    _C.use_torch(torch)
except ImportError as error:
    load_error = f"the compiled module afa_kernels._C cannot be loaded ({error}); build it with `pip install .`"


def _recognizes_nothing(*_operands: object) -> bool:
    return False


# Whether operands are ordinary CPU tensors that pass the checks of checks.py. False means only: not recognized.
recognizes_lora = recognizes_linear = _recognizes_nothing
if _C is not None:
    recognizes_lora, recognizes_linear = _C.recognizes_lora, _C.recognizes_linear


def environment(name: str) -> str | None:
    """Return an environment variable; a missing one costs ``os.environ`` as much as a small kernel."""
    return os.environ.get(name) if _C is None else _C.environment(name)


def value_of(scalar: torch.Tensor) -> float:
    """Return the value of a 0-dim float32 tensor on the CPU, past the dispatcher if it is in memory as it is."""
    if _C is None or scalar.is_neg() or torch_private.is_zero_tensor(scalar):
        return scalar.item()
    return _C.float_at(scalar)
