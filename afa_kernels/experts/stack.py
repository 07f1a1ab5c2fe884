"""AFAExpertStack: several adapters beside one fused parameter, each with a branch for each expert."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from afa_kernels.experts.layer import AFAExperts, BesideExperts, ExpertBranch, check_parameter
from afa_kernels.layers.branch import AdapterCall, BranchOptions
from afa_kernels.layers.stack import AdapterStack


class AFAExpertStack(BesideExperts, AdapterStack):
    """A stack of AFA-LoRA adapters beside one fused parameter of an experts module, each with a branch for each expert.

    It is to :class:`AFAExpertLinear` what :class:`afa_kernels.AFALinearStack` is to :class:`afa_kernels.AFALinear`. Of
    an adapter that computes some tokens, an expert that they do not meet has a gradient of zeros.

    Args:
        experts, parameter: as in :class:`AFAExpertLinear`.
        adapters: for each name the options of :class:`afa_kernels.AFALinear` that differ from their defaults.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is wanted.
    """

    def __init__(self, experts: nn.Module, parameter: str, adapters: Mapping[str, Mapping[str, Any]]):
        check_parameter(experts, parameter)
        check_whole(experts)
        super().__init__()
        self._stand_beside(experts, parameter)
        for name, options in adapters.items():
            self.add_adapter(name, **options)

    def _branch(self, options: BranchOptions) -> ExpertBranch:
        return ExpertBranch(self.experts, self.parameter, options)

    def calls(self) -> list[list[AdapterCall | None]]:
        return [self.calls_of(self.assignment())]


def check_whole(experts: nn.Module) -> None:
    """Raise unless the tokens of a batch reach the experts in the order of its samples."""
    if experts._is_expert_parallel:
        raise ValueError(
            "adapters: expected experts that are whole in each process (DDP, FSDP2). Under expert parallelism tokens "
            "are exchanged between processes, and the names of their adapters are not; leave the adapters without "
            "names, one in a model"
        )


def check_names_of(block: nn.Module) -> None:
    """Let a block of a model check the names of adapters against its batch: the experts in it see a batch's tokens,
    without its samples."""
    block.register_forward_pre_hook(_check_names)


def check_no_names_of(block: nn.Module) -> None:
    """Undo :func:`check_names_of`."""
    hooks = block._forward_pre_hooks  # by what they call: a handle would not be copied with the block
    for key in [key for key, hook in hooks.items() if hook is _check_names]:
        del hooks[key]


def _check_names(block: nn.Module, args: tuple) -> None:
    if not args or not isinstance(args[0], Tensor) or args[0].dim() < 3:
        return
    for experts in block.children():
        assignment = experts.afa.assignment() if isinstance(getattr(experts, "afa", None), AFAExperts) else None
        if assignment is not None:
            assignment.rows_of_a_name(args[0])
