"""AFAExpertLinear: the branches of all experts beside one fused parameter."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from afa_kernels.experts.forward import attach, detach
from afa_kernels.experts.parameters import local, weight_of, why_unsupported
from afa_kernels.layers.branch import AdapterCall, Branch, BranchOptions
from afa_kernels.layers.merging import Mergeable
from afa_kernels.layers.mixed import Assignment
from afa_kernels.layers.stack import AdapterStack

EXPERT_RANKS = ("same", "per_active")


class ExpertBranch(Branch):
    """A branch for each expert beside one fused parameter, sharded as the parameter is."""

    def __init__(self, experts: nn.Module, parameter: str, options: BranchOptions):
        super().__init__(weight_of(experts, parameter), options)
        self.num_experts = self.lora_a.shape[0]
        weight = getattr(experts, parameter)
        self.lora_a = nn.Parameter(_sharded_like(weight, self.lora_a.detach()))
        self.lora_b = nn.Parameter(_sharded_like(weight, self.lora_b.detach()))

    def call(self) -> AdapterCall:
        lora_a, lora_b, *rest = super().call()
        return AdapterCall(local(lora_a), local(lora_b), *rest)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {super().extra_repr()}"


class BesideExperts:
    """Base of what stands beside one fused parameter of an experts module."""

    def _stand_beside(self, experts: nn.Module, parameter: str) -> None:
        """Note the experts module, in ``__init__``, and freeze the parameter."""
        self.__dict__["experts"] = experts  # no submodule: this layer is a part of it
        self.parameter = parameter
        self.weight.requires_grad_(False)
        self.train(experts.training)

    @property
    def weight(self) -> Tensor:
        """The fused parameter."""
        return getattr(self.experts, self.parameter)


class AFAExpertLinear(BesideExperts, Mergeable, ExpertBranch):
    """A trainable AFA-LoRA branch for each expert, beside one fused parameter of an experts module.

    For the rows of expert e it adds ``scaling * phi(dropout(x) @ lora_a[e].T) @ lora_b[e].T`` to the frozen product.
    :func:`afa_kernels.inject` makes it; the module computes with it as soon as an :class:`AFAExperts` holds it. It
    starts and ends as :class:`afa_kernels.AFALinear` does.

    Args:
        experts: the experts module, which stays the owner of its parameters. They are frozen.
        parameter: the name of the parameter, ``"gate_up_proj"`` or ``"down_proj"``.
        options: as in :class:`afa_kernels.AFALinear`; r is the rank of each expert.

    ``lora_a (E, r, K)`` and ``lora_b (E, N, r)`` are sharded as the parameter is under transformers' expert
    parallelism.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is wanted.
    """

    def __init__(self, experts: nn.Module, parameter: str, **options: Any):
        check_parameter(experts, parameter)
        super().__init__(experts, parameter, BranchOptions(**options))
        self._stand_beside(experts, parameter)
        self._weight_is_loaded = False  # set by AFAExperts while a state dict is loaded

    def calls(self) -> list[list[AdapterCall]]:
        return [] if self._merged else [[self.call()]]

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One expert of this process after the other."""
        weights = local(weight_of(self.experts, self.parameter).detach())
        yield from zip(weights, local(self.lora_a), local(self.lora_b), strict=True)

    def _brings_weight(self, _state_dict: dict[str, Tensor], _prefix: str) -> bool:
        # A submodule is shown its own part of a state dict alone: AFAExperts looks at the parameters.
        brings, self._weight_is_loaded = self._weight_is_loaded, False
        return brings


class AFAExperts(nn.ModuleDict):
    """What stands beside the targeted parameters of an experts module, which keeps it as ``afa``."""

    def attach(self, experts: nn.Module) -> None:
        """Let ``experts`` compute with these branches."""
        attach(experts, self)
        self._hook = experts.register_load_state_dict_pre_hook(_note_weights)

    def detach(self, experts: nn.Module) -> None:
        """Undo :meth:`attach`."""
        self._hook.remove()
        detach(experts)

    def assignment(self) -> Assignment | None:
        for layer in self.values():
            if isinstance(layer, AdapterStack):
                return layer.assignment()
        return None

    def calls(self, parameter: str) -> list[list[AdapterCall | None]]:
        return self[parameter].calls() if parameter in self else []


def check_parameter(experts: nn.Module, parameter: str) -> None:
    reason = why_unsupported(experts, parameter)
    if reason is not None:
        raise TypeError(f"parameter: {parameter} cannot be adapted: {reason}")


def rank_of_expert(experts: nn.Module, r: int, expert_rank: str) -> int:
    """Return the rank of each expert: r, or its share of r where a token is to see r columns of A in all."""
    if expert_rank == "same":
        return r
    active = getattr(experts.config, "num_experts_per_tok", None)
    if active is None:
        raise ValueError(
            f"expert_rank: {type(experts.config).__name__} has no num_experts_per_tok to divide r by; "
            "expected expert_rank='same' and the rank of an expert as r"
        )
    return max(1, r // active)


def check_expert_rank(value: object) -> None:
    if value not in EXPERT_RANKS:
        raise ValueError(f"expert_rank: expected one of {', '.join(EXPERT_RANKS)}, got {value!r}")


def _note_weights(experts: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_others: object) -> None:
    """Tell the branches of ``experts`` whether a state dict that is about to be loaded has their fused parameters."""
    for parameter, layer in experts.afa.items():
        if isinstance(layer, AFAExpertLinear):
            layer._weight_is_loaded = prefix + parameter in state_dict


def _sharded_like(parameter: Tensor, t: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, parameter.device_mesh, parameter.placements)
