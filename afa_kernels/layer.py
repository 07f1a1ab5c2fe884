"""AFALinear: a frozen linear layer with a trainable branch whose activation anneals away."""

import torch
from torch import Tensor, nn

from afa_kernels import checks
from afa_kernels.alpha import normal
from afa_kernels.base_layer import is_conv1d, is_plain, weight_of
from afa_kernels.branch import Branch
from afa_kernels.functional import LinearCall, linear, lora
from afa_kernels.plan import Plan, plan_of

SUPPORTED = "torch.nn.Linear or transformers' Conv1D with a floating-point weight"
_MERGED_KEY = "merged"


def why_unsupported(module: nn.Module) -> str | None:
    """Return why ``module`` cannot be the base of an AFALinear, or None if it can."""
    if isinstance(module, AFALinear):
        return "it is an AFALinear already"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{type(module).__name__} has no shape yet; run it once first"
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"it is a {type(module).__name__}"
    if module.weight.dtype not in checks.FLOATING:
        dtype = str(module.weight.dtype).removeprefix("torch.")
        return f"{type(module).__name__} has a weight of {dtype}"
    return None


class AFALinear(Branch):
    """A frozen linear layer with a trainable AFA-LoRA branch.

    ``y = base_layer(x) + scaling * phi(dropout(x) @ lora_a.T) @ lora_b.T`` with
    ``phi(z) = (1 - alpha_t) * z + alpha_t * act(z)``. It starts at ``alpha_t = 1`` with
    ``lora_b = 0``, so its output is first that of ``base_layer``. At ``alpha_t = 0`` the branch is
    an ordinary LoRA: it runs without an activation and can be merged.

    Args:
        base_layer: ``torch.nn.Linear`` or transformers' ``Conv1D``. Its parameters are frozen; the
            layer keeps it.
        r: rank of the branch, 1 or more.
        lora_alpha: numerator of ``scaling = lora_alpha / r``.
        activation: a name from :func:`afa_kernels.activations`.
        dropout: probability of LoRA dropout, in training only; rounded to 1/256 (see
            :func:`afa_kernels.afa_lora`).
        use_rslora: ``scaling = lora_alpha / sqrt(r)`` instead.
        dtype: dtype of ``lora_a (r, K)`` and ``lora_b (N, r)``; by default float32 beside a 16-bit
            base, as in PEFT, else the dtype of the base.
        save, backend: as in :func:`afa_kernels.afa_lora`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is
            wanted.

    ``alpha_t_buffer`` (0-dim, float32 on every device and in every dtype of the model, part of the
    state dict) holds what kernels read. It is written in place, so a new value neither recompiles a
    compiled model nor waits for the device. Reaching or leaving identity flips a flag, which
    recompiles once and switches to the GEMM path.

    A merged layer runs its base layer and nothing else: lora_a and lora_b get no gradient and must
    not be changed.
    """

    def __init__(
        self,
        base_layer: nn.Module,
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
        reason = why_unsupported(base_layer)
        if reason is not None:
            raise TypeError(f"base_layer: expected {SUPPORTED}; {reason}")
        super().__init__(
            base_layer, r, lora_alpha, activation, dropout, use_rslora, dtype=dtype, save=save, backend=backend
        )
        self.base_layer = base_layer.requires_grad_(False)
        self.register_buffer("_original_weight", None, persistent=False)
        self._merged = False
        self._shared_input = None  # set by shared_input.SharedInput for the time of a call of the block
        self._parallel = None  # set by the styles of parallel.py: the forward on local shards
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer: what code that inspects a linear layer expects to find."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the branch is part of the base layer's weight."""
        return self._merged

    def set_alpha_t(self, value: float) -> None:
        """Set the blend coefficient, in [0, 1]. Values that float32 cannot hold as normal numbers
        become 0.

        Raises:
            TypeError, ValueError: ``value`` is no number in [0, 1], or is not 0 while the layer is
                merged.
        """
        value = normal(checks.alpha_value(value))
        if self._merged and value != 0.0:
            raise ValueError(f"alpha_t: a merged layer is an ordinary linear layer, got {value}; unmerge() first")
        self.write_alpha_t(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``base_layer(x)`` plus the branch: ``(..., K) -> (..., N)``."""
        if self._parallel is not None:
            return self._parallel(self, x)
        if self._merged:
            return self.base_layer(x)
        if self._shared_input is not None:
            y = self._shared_input.take(self, x)
            if y is not None:
                return y
        call = self.linear_call()
        if call is not None:
            return linear(x, *call)
        branch = (self.lora_a, self.lora_b, self.coefficient(), self.options)
        return lora(x, *branch, base=self.base_layer(x), inplace=self._base_output_is_ours())

    def linear_call(self) -> LinearCall | None:
        """Return what ``linear(x, ...)`` takes beside x, or None where the layer computes in another way: it is merged
        or sharded, or its base layer cannot be left out."""
        base = self.base_layer
        if self._merged or self._parallel is not None or not is_plain(base):
            return None
        return LinearCall(
            weight_of(base), base.bias, self.lora_a, self.lora_b, self.coefficient(), self.options
        )  # fmt: skip

    def plan(self, x: Tensor) -> Plan:
        """Return what ``self(x)`` would do."""
        if self._merged:
            return Plan("torch", "merged", "the branch is part of the frozen weight")
        return plan_of(x, self.lora_a, self.lora_b, self.identity, self.options)

    def merge(self, *, keep_original: bool = False) -> None:
        """Add ``scaling * lora_b @ lora_a`` to the weight: afterwards the layer costs one GEMM.
        Merging twice is once.

        The sum is computed in float32 (float64 for float64) and rounded once to the dtype of the
        weight.

        Args:
            keep_original: keep a copy of the weight (as much memory as the weight) for a bit-exact
                :meth:`unmerge`; otherwise unmerge subtracts, which costs no memory and leaves about
                one rounding of the weight's dtype.

        Raises:
            ValueError: ``alpha_t`` is not 0, the base layer computes its weight, or the merged
                weight is not finite.
        """
        if self._merged:
            if keep_original and self._original_weight is None:
                raise ValueError("keep_original: the layer is merged already and the original weight is gone")
            return
        merged = self.merged_weight()
        if keep_original:
            self._original_weight = self.base_layer.weight.detach().clone()
        with torch.no_grad():
            self.base_layer.weight.copy_(merged)
        self._merged = True

    def unmerge(self) -> None:
        """Undo :meth:`merge`: bit for bit if it kept the original, by subtraction otherwise."""
        if not self._merged:
            return
        weight = self.base_layer.weight
        with torch.no_grad():
            if self._original_weight is not None:
                weight.copy_(self._original_weight)
            else:
                weight.copy_(self._weight_plus(-self.scaling))
        self._original_weight = None
        self._merged = False

    def merged_weight(self) -> Tensor:
        """Return the weight that :meth:`merge` would write, checked, in the layout of the base
        layer's weight.

        Raises:
            ValueError: as in :meth:`merge`.
        """
        if not self.identity:
            raise ValueError(
                f"merge: alpha_t is {self._alpha_t}, so the branch is not linear in x and no "
                "weight equals it; anneal to alpha_t = 0 first"
            )
        if "weight" not in self.base_layer._parameters:
            raise ValueError("merge: the base layer computes its weight (a parametrization); remove that first")
        merged = self._weight_plus(self.scaling)
        if merged.device.type != "meta" and not bool(torch.isfinite(merged).all()):
            raise ValueError("merge: the merged weight would not be finite; the weight is unchanged")
        return merged

    def check_merge(self) -> None:
        """Raise the ValueError that :meth:`merge` would raise."""
        self.merged_weight()

    @torch.no_grad()
    def _weight_plus(self, factor: float) -> Tensor:
        weight = self.base_layer.weight
        wide = torch.float64 if torch.float64 in (weight.dtype, self.lora_a.dtype) else torch.float32
        with torch.autocast(weight.device.type, enabled=False):
            product = self.lora_b.to(wide) @ self.lora_a.to(wide)
        if self.transposed:
            product = product.T
        return torch.add(weight.to(wide), product, alpha=factor).to(weight.dtype)

    def _base_output_is_ours(self) -> bool:
        """Whether the base layer's output may be accumulated into: a hook may keep it, another
        forward may save it."""
        base = self.base_layer
        return type(base).forward is nn.Linear.forward and "forward" not in base.__dict__ and not base._forward_hooks

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged:
            # The saved weight contains the branch: a layer that loads it must not add the branch
            # again.
            destination[prefix + _MERGED_KEY] = torch.ones((), dtype=torch.bool)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        merged = prefix + _MERGED_KEY in state_dict
        brings_branch = any(prefix + name in state_dict for name in ("lora_a", "lora_b", "alpha_t_buffer"))
        if (self._merged or merged) and brings_branch and prefix + "base_layer.weight" not in state_dict:
            error_msgs.append(f"{prefix}lora_a: a branch of a merged layer cannot be loaded without its weight")
            return
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + _MERGED_KEY in unexpected_keys:
            unexpected_keys.remove(prefix + _MERGED_KEY)
        if brings_branch and len(error_msgs) == errors:
            self._merged = merged
            self._original_weight = None
