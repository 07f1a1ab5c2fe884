"""AFAExpertLinear: the branches of all experts beside one fused parameter."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from afa_kernels import checks
from afa_kernels.branch import check_options
from afa_kernels.experts import seam
from afa_kernels.experts.parameters import BranchCall, local, weight_of, why_unsupported
from afa_kernels.merging import Mergeable, plus

EXPERT_RANKS = ("same", "per_active")


class AFAExpertLinear(Mergeable):
    """A trainable AFA-LoRA branch for each expert, beside one fused parameter of an experts module.

    For the rows of expert e it adds ``scaling * phi(dropout(x) @ lora_a[e].T) @ lora_b[e].T`` to the frozen product.
    :func:`afa_kernels.inject` makes it; the module computes with it as soon as an :class:`AFAExperts` holds it. It
    starts and ends as :class:`afa_kernels.AFALinear` does.

    Args:
        experts: the experts module, which stays the owner of its parameters. They are frozen.
        parameter: the name of the parameter, ``"gate_up_proj"`` or ``"down_proj"``.
        r: rank of each expert.
        lora_alpha, activation, dropout, use_rslora, dtype, save, backend: as in :class:`afa_kernels.AFALinear`.

    ``lora_a (E, r, K)`` and ``lora_b (E, N, r)`` are sharded as the parameter is under transformers' expert
    parallelism.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is wanted.
    """

    def __init__(
        self,
        experts: nn.Module,
        parameter: str,
        r: int = 8,
        lora_alpha: float = 16,
        activation: str = "silu",
        dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | None = None,
        save: str = "z",
        backend: str | None = None,
    ):
        super().__init__()
        reason = why_unsupported(experts, parameter)
        if reason is not None:
            raise TypeError(f"parameter: {parameter} cannot be adapted: {reason}")
        check_options(r, lora_alpha, activation, dropout, save, backend)
        weight = getattr(experts, parameter).requires_grad_(False)
        if dtype is None:
            dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        if dtype not in checks.FLOATING:
            raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
        self.__dict__["experts"] = experts  # no submodule: this layer is a part of it
        self.parameter = parameter
        self.num_experts, self.out_features, self.in_features = weight_of(experts, parameter).shape
        self.r, self.lora_alpha, self.use_rslora = int(r), lora_alpha, bool(use_rslora)
        self.scaling = float(lora_alpha) / (math.sqrt(r) if use_rslora else r)
        self.activation, self.dropout, self.save, self.backend = activation, float(dropout), save, backend
        # One matrix for the initialisation and for a file: PEFT's own shape and its own distribution.
        a = torch.empty(self.num_experts * self.r, self.in_features, dtype=dtype, device=weight.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = torch.zeros(self.num_experts, self.out_features, self.r, dtype=dtype, device=weight.device)
        self.lora_a = nn.Parameter(_sharded_like(weight, a.view(self.num_experts, self.r, self.in_features)))
        self.lora_b = nn.Parameter(_sharded_like(weight, b))
        self.start_alpha_t(1.0, weight.device, persistent=True)
        self._weight_is_loaded = False  # set by AFAExperts while a state dict is loaded
        self.train(experts.training)

    @property
    def weight(self) -> Tensor:
        """The fused parameter."""
        return getattr(self.experts, self.parameter)

    def branch(self) -> BranchCall:
        """Return what a call needs; dropout acts in training only."""
        return BranchCall(
            self.lora_a, self.lora_b, self.coefficient(), self.activation, self.scaling,
            self.dropout if self.training else 0.0, self.save, self.backend,
        )  # fmt: skip

    def _sums(self, factor: float) -> Iterator[tuple[Tensor, Tensor]]:
        """One expert of this process after the other."""
        weights = local(weight_of(self.experts, self.parameter).detach())
        for weight, a, b in zip(weights, local(self.lora_a), local(self.lora_b), strict=True):
            yield weight, plus(weight, a, b, factor)

    def _brings_weight(self, _state_dict: dict[str, Tensor], _prefix: str) -> bool:
        # A submodule is shown its own part of a state dict alone: AFAExperts looks at the parameters.
        brings, self._weight_is_loaded = self._weight_is_loaded, False
        return brings

    def extra_repr(self) -> str:
        state = "merged" if self._merged else f"alpha_t={self._alpha_t:g}"
        return (
            f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"r={self.r}, scaling={self.scaling:g}, activation={self.activation}, dropout={self.dropout:g}, {state}"
        )


class AFAExperts(nn.ModuleDict):
    """The :class:`AFAExpertLinear` of the targeted parameters of an experts module, which keeps it as ``afa``."""

    def attach(self, experts: nn.Module) -> None:
        """Let ``experts`` compute with these branches."""
        seam.attach(experts, self)
        self._hook = experts.register_load_state_dict_pre_hook(_note_weights)

    def detach(self, experts: nn.Module) -> None:
        """Undo :meth:`attach`."""
        self._hook.remove()
        seam.detach(experts)

    def branches(self, parameter: str) -> list[BranchCall]:
        if parameter not in self or self[parameter].merged:
            return []
        return [self[parameter].branch()]


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
        layer._weight_is_loaded = prefix + parameter in state_dict


def _sharded_like(parameter: Tensor, t: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, parameter.device_mesh, parameter.placements)
