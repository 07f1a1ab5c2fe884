"""Finds the compiled module ``afa_kernels._C``. Import never fails: the error is kept for whoever asks for a kernel.
A module that another version of the package left behind counts as none.

What Python does slowly and every call needs is done by the module where there is one.
"""

import importlib
import os
from types import ModuleType

import torch

from afa_kernels import torch_private
from afa_kernels.operator.activation import COMPILED_IDS

OTHER_VERSION = "the compiled module afa_kernels._C is of another version of this package"
# All that the package uses of the module, and of its CUDA part where it has one.
_NAMES = (
    "activation_ids", "are_plain", "build_info", "cpu_features", "cpu_shared_backward", "cpu_shared_forward",
    "cpu_backward", "cpu_backward_by_owner", "cpu_forward", "cpu_forward_by_owner", "cpu_isa", "cpu_isas",
    "environment", "float_at", "recognizes_shared", "recognizes_linear", "recognizes_lora", "use_torch",
)  # fmt: skip
_CUDA_NAMES = (
    "backward", "backward_workspace", "device_limits", "forward", "forward_workspace", "kernel_image_failure",
    "launch_plan", "use_torch", "versions",
)  # fmt: skip


def _load() -> tuple[ModuleType | None, str]:
    """Return the module, or None and what keeps it from being used."""
    try:
        module = importlib.import_module(f"{__name__.removesuffix('.backend.compiled')}._C")
    except ImportError as error:
        return None, f"the compiled module afa_kernels._C cannot be loaded ({error}); build it with `pip install .`"
    missing = [name for name in _NAMES if not hasattr(module, name)]
    if hasattr(module, "cuda"):
        missing += [f"cuda.{name}" for name in _CUDA_NAMES if not hasattr(module.cuda, name)]
    if missing:
        return None, f"{OTHER_VERSION} (it has no {', '.join(missing)}); build it again with `pip install .`"
    if module.activation_ids() != COMPILED_IDS:
        return None, f"{OTHER_VERSION} (it has other activations); build it again with `pip install .`"
    module.use_torch(torch)
    return module, ""


_C, load_error = _load()


def _recognizes_nothing(*_operands: object) -> bool:
    return False


# Whether operands are ordinary tensors on the CPU or on a CUDA device (None counts as one), and whether they pass the
# checks of checks.py. False means only: not recognized.
are_plain = recognizes_lora = recognizes_linear = recognizes_shared = _recognizes_nothing
if _C is not None:
    are_plain, recognizes_lora = _C.are_plain, _C.recognizes_lora
    recognizes_linear, recognizes_shared = _C.recognizes_linear, _C.recognizes_shared


def environment(name: str) -> str | None:
    """Return an environment variable; a missing one costs ``os.environ`` as much as a small kernel."""
    return os.environ.get(name) if _C is None else _C.environment(name)


def value_of(scalar: torch.Tensor) -> float:
    """Return the value of a 0-dim float32 tensor on the CPU, past the dispatcher if it is in memory as it is."""
    if _C is None or scalar.is_neg() or torch_private.is_zero_tensor(scalar):
        return scalar.item()
    return _C.float_at(scalar)
