"""Fused CUDA, Triton and CPU kernels for AFA-LoRA, the LoRA whose activation anneals away.

Import is silent: nothing is compiled, no device is touched, no other library is patched.
"""

from afa_kernels.activation import activations
from afa_kernels.alpha import set_alpha_t
from afa_kernels.autograd import AFALoRAFunction
from afa_kernels.backend import builtin as _builtin  # noqa: F401 - registers the backends
from afa_kernels.backend.registry import BackendStatus, BackendUnavailable, backends, use_backend
from afa_kernels.checkpoint import load_adapter, save_adapter
from afa_kernels.experts import AFAExpertLinear, AFAExpertStack
from afa_kernels.functional import afa_linear, afa_lora
from afa_kernels.group import AFALinearGroup
from afa_kernels.layer import AFALinear
from afa_kernels.model import inject, merge, unload, unmerge
from afa_kernels.plan import Plan, plan
from afa_kernels.schedule import AnnealSchedule
from afa_kernels.shared_input import share_inputs, unshare_inputs
from afa_kernels.stack import AFALinearStack, adapters_of, add_adapter, delete_adapter

__version__ = "0.2.0"

__all__ = [
    "AFAExpertLinear",
    "AFAExpertStack",
    "AFALinear",
    "AFALinearGroup",
    "AFALinearStack",
    "AFALoRAFunction",
    "AnnealSchedule",
    "BackendStatus",
    "BackendUnavailable",
    "Plan",
    "activations",
    "adapters_of",
    "add_adapter",
    "afa_linear",
    "afa_lora",
    "backends",
    "delete_adapter",
    "inject",
    "load_adapter",
    "merge",
    "plan",
    "save_adapter",
    "set_alpha_t",
    "share_inputs",
    "unload",
    "unmerge",
    "unshare_inputs",
    "use_backend",
]
