"""AFAExpertLinear: the branches of all experts beside one fused parameter."""

import math

import torch
from torch import Tensor, nn

from afa_kernels import checks
from afa_kernels.alpha import Annealed, normal
from afa_kernels.branch import check_options
from afa_kernels.experts.parameters import BranchCall, local, weight_of, why_unsupported

EXPERT_RANKS = ("same", "per_active")
_MERGED_KEY = "merged"


class AFAExpertLinear(Annealed):
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
        self._merged = False
        self._original: Tensor | None = None
        self.train(experts.training)

    @property
    def weight(self) -> Tensor:
        """The fused parameter."""
        return getattr(self.experts, self.parameter)

    @property
    def merged(self) -> bool:
        """Whether the branches are part of the fused parameter."""
        return self._merged

    def set_alpha_t(self, value: float) -> None:
        """Set the blend coefficient, as :meth:`afa_kernels.AFALinear.set_alpha_t` does."""
        value = normal(checks.alpha_value(value))
        if self._merged and value != 0.0:
            raise ValueError(f"alpha_t: merged experts have no branch, got {value}; unmerge() first")
        self.write_alpha_t(value)

    def branch(self) -> BranchCall:
        """Return what a call needs; dropout acts in training only."""
        return BranchCall(
            self.lora_a, self.lora_b, self.coefficient(), self.activation, self.scaling,
            self.dropout if self.training else 0.0, self.save, self.backend,
        )  # fmt: skip

    def check_merge(self) -> None:
        """Raise the ValueError that :meth:`merge` would raise."""
        if not self.identity:
            raise ValueError(
                f"merge: alpha_t is {self._alpha_t}, so the branch is not linear in x and no "
                "weight equals it; anneal to alpha_t = 0 first"
            )
        finite = [torch.isfinite(merged).all() for _, merged in self._sums(self.scaling)]
        if not all(map(bool, finite)):
            raise ValueError("merge: the merged weight would not be finite; the weight is unchanged")

    @torch.no_grad()
    def merge(self, *, keep_original: bool = False) -> None:
        """Add ``scaling * lora_b[e] @ lora_a[e]`` to the weight of each expert, one expert after the other. Arguments
        and errors as in :meth:`afa_kernels.AFALinear.merge`."""
        if self._merged:
            if keep_original and self._original is None:
                raise ValueError("keep_original: the layer is merged already and the original weight is gone")
            return
        self.check_merge()
        if keep_original:
            self._original = self.weight.detach().clone()
        self._write(self.scaling)
        self._merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`: bit for bit if it kept the original, by subtraction otherwise."""
        if not self._merged:
            return
        if self._original is not None:
            self.weight.copy_(self._original)
        else:
            self._write(-self.scaling)
        self._original, self._merged = None, False

    def _write(self, factor: float) -> None:
        for weight, merged in self._sums(factor):
            weight.copy_(merged)

    @torch.no_grad()
    def _sums(self, factor: float):
        """Yield the weight of each expert of this process, ``(N, K)``, and its sum with ``factor`` times its branch,
        rounded once."""
        weights = local(weight_of(self.experts, self.parameter).detach())
        for weight, a, b in zip(weights, local(self.lora_a), local(self.lora_b), strict=True):
            wide = torch.float64 if torch.float64 in (weight.dtype, a.dtype) else torch.float32
            with torch.autocast(weight.device.type, enabled=False):
                product = b.to(wide) @ a.to(wide)
            yield weight, torch.add(weight.to(wide), product, alpha=factor).to(weight.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged:
            # The saved parameter contains the branches: who loads it must not add them again.
            destination[prefix + _MERGED_KEY] = torch.ones((), dtype=torch.bool)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        merged = prefix + _MERGED_KEY in state_dict
        brings_branch = any(prefix + name in state_dict for name in ("lora_a", "lora_b", "alpha_t_buffer"))
        try:
            value = self._loaded_alpha_t(state_dict, prefix)
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + _MERGED_KEY in unexpected_keys:
            unexpected_keys.remove(prefix + _MERGED_KEY)
        self._take_loaded_alpha_t(value)
        if brings_branch:
            self._merged, self._original = merged, None

    def extra_repr(self) -> str:
        state = "merged" if self._merged else f"alpha_t={self._alpha_t:g}"
        return (
            f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"r={self.r}, scaling={self.scaling:g}, activation={self.activation}, dropout={self.dropout:g}, {state}"
        )


class AFAExperts(nn.ModuleDict):
    """The :class:`AFAExpertLinear` of the targeted parameters of an experts module, which keeps it as ``afa``."""

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


def _sharded_like(parameter: Tensor, t: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, parameter.device_mesh, parameter.placements)
