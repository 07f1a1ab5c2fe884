"""Fused CUDA, Triton and CPU kernels for AFA-LoRA, the LoRA whose activation anneals away.

Import is silent: nothing is compiled, no device is touched, no other library is patched.
"""

from afa_kernels.alpha_t import set_alpha_t
from afa_kernels.backend import builtin as _builtin  # noqa: F401 - registers the backends
from afa_kernels.backend.choice import backends, use_backend
from afa_kernels.backend.interface import BackendStatus, BackendUnavailable
from afa_kernels.experts import AFAExpertLinear, AFAExpertStack
from afa_kernels.layers.kept import MergeReport
from afa_kernels.layers.linear import AFALinear
from afa_kernels.layers.shared_input import AFASharedInput
from afa_kernels.layers.stack import AFALinearStack, adapters_of, add_adapter, delete_adapter
from afa_kernels.model.checkpoint import load_adapter, save_adapter
from afa_kernels.model.inject import inject, unload
from afa_kernels.model.merge import merge, merge_report, unmerge
from afa_kernels.model.mlp import fuse_mlp, plan_mlp, unfuse_mlp
from afa_kernels.model.sharing import share_inputs, unshare_inputs
from afa_kernels.operator.activation import activations
from afa_kernels.operator.autograd import AFALoRAFunction
from afa_kernels.operator.functional import afa_linear, afa_lora
from afa_kernels.operator.plan import Plan, plan
from afa_kernels.schedule import AnnealSchedule

__version__ = "0.2.0"

__all__ = [
    "AFAExpertLinear",
    "AFAExpertStack",
    "AFALinear",
    "AFALinearStack",
    "AFALoRAFunction",
    "AFASharedInput",
    "AnnealSchedule",
    "BackendStatus",
    "BackendUnavailable",
    "MergeReport",
    "Plan",
    "activations",
    "adapters_of",
    "add_adapter",
    "afa_linear",
    "afa_lora",
    "backends",
    "delete_adapter",
    "fuse_mlp",
    "inject",
    "load_adapter",
    "merge",
    "merge_report",
    "plan",
    "plan_mlp",
    "save_adapter",
    "set_alpha_t",
    "share_inputs",
    "unfuse_mlp",
    "unload",
    "unmerge",
    "unshare_inputs",
    "use_backend",
]
