"""Finds the compiled module ``afa_kernels._C``. Import never fails: the error is kept for whoever asks for a kernel."""

import importlib
from types import ModuleType

_C: ModuleType | None = None
load_error = ""
try:
    _C = importlib.import_module("afa_kernels._C")
except ImportError as error:
    load_error = f"the compiled module afa_kernels._C cannot be loaded ({error}); build it with `pip install .`"
