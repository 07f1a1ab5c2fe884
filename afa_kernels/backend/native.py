"""Finds the compiled module ``afa_kernels._C``. Import never fails: the error is kept for whoever asks for a kernel.

What Python does slowly and every call needs is done by the module where there is one.
"""

import importlib
import os
from types import ModuleType

import torch

_C: ModuleType | None = None
load_error = ""
try:
    _C = importlib.import_module("afa_kernels._C")
    _C.use_torch(torch)
except ImportError as error:
    load_error = f"the compiled module afa_kernels._C cannot be loaded ({error}); build it with `pip install .`"


def _recognizes_nothing(*_operands: object) -> bool:
    return False


# Whether operands pass the checks of checks.py; False may mean anything.
accepts_branch = accepts_base = accepts_linear = _recognizes_nothing
if _C is not None:
    accepts_branch, accepts_base, accepts_linear = _C.accepts_branch, _C.accepts_base, _C.accepts_linear


def environment(name: str) -> str | None:
    """Return an environment variable; a missing one costs ``os.environ`` as much as a small kernel."""
    return os.environ.get(name) if _C is None else _C.environment(name)


def value_of(scalar: torch.Tensor) -> float:
    """Return the value of a 0-dim float32 tensor on the CPU, past the dispatcher if it is in memory as it is."""
    if _C is None or scalar.is_neg() or scalar._is_zerotensor():
        return scalar.item()
    return _C.float_at(scalar)
