"""AFALinear: a frozen linear layer with a trainable branch whose activation anneals away."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from afa_kernels.layers.base_layer import (
    REPACKED,
    LikeItsBase,
    check_gives_gradient,
    is_conv1d,
    is_quantized,
    is_repacked,
    parameter_of,
    why_not_written,
)
from afa_kernels.layers.branch import Branch, BranchOptions
from afa_kernels.layers.kept import Kept
from afa_kernels.layers.merging import Mergeable, dense_sum, put_dense
from afa_kernels.layers.quantized import frozen_weight, is_dequantizable, kind_of, way_of, weight_like
from afa_kernels.operator.functional import LinearCall, linear, lora
from afa_kernels.operator.plan import Plan, plan_of
from afa_kernels.torch_private import is_view

SUPPORTED = "torch.nn.Linear or transformers' Conv1D with a floating-point weight, or a quantized layer that is known"


def why_unsupported(module: nn.Module) -> str | None:
    """Return why ``module`` cannot be the base of an AFALinear, or None if it can."""
    if isinstance(module, AFALinear):
        return "it is an AFALinear already"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{type(module).__name__} has no shape yet; run it once first"
    linear = isinstance(module, nn.Linear) or is_conv1d(module)
    kind = f" of {str(module.weight.dtype).removeprefix('torch.')}" if linear else ""
    if is_quantized(module):
        if kind_of(module) is not None:
            return None
        return f"{type(module).__name__} has a quantized weight{kind}, which PEFT with an AFALoraConfig can adapt"
    if not linear:
        return f"it is a {type(module).__name__}"
    if module.weight.is_complex():
        return f"{type(module).__name__} has a weight{kind}"
    return None


class AFALinear(LikeItsBase, Mergeable, Branch):
    """A frozen linear layer with a trainable AFA-LoRA branch.

    ``y = base_layer(x) + scaling * phi(dropout(x) @ lora_a.T) @ lora_b.T`` with
    ``phi(z) = (1 - alpha_t) * z + alpha_t * act(z)``. It starts at ``alpha_t = 1`` with
    ``lora_b = 0``, so its output is first that of ``base_layer``. At ``alpha_t = 0`` the branch is
    an ordinary LoRA: it runs without an activation and can be merged.

    Args:
        base_layer: ``torch.nn.Linear`` or transformers' ``Conv1D``. Its parameters are frozen; the
            layer keeps it. Or a quantized layer of bitsandbytes, HQQ, torchao, quanto or transformers' block-FP8, which
            :meth:`merge` leaves as it is but with ``dequantize=True``.
        r: rank of the branch, 1 or more.
        lora_alpha: numerator of ``scaling = lora_alpha / r``.
        activation: a name from :func:`afa_kernels.activations`.
        dropout: probability of LoRA dropout, in training only; rounded to 1/256 (see
            :func:`afa_kernels.afa_lora`).
        use_rslora: ``scaling = lora_alpha / sqrt(r)`` instead.
        dtype: dtype of ``lora_a (r, K)`` and ``lora_b (N, r)``; by default float32 beside a 16-bit
            base, as in PEFT, else the dtype of the base.
        backend: as in :func:`afa_kernels.afa_lora`.

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
        backend: str | None = None,
    ):
        reason = why_unsupported(base_layer)
        if reason is not None:
            raise TypeError(f"base_layer: expected {SUPPORTED}; {reason}")
        options = BranchOptions(r, lora_alpha, activation, dropout, use_rslora, dtype, backend)
        super().__init__(weight_like(base_layer), options, transposed=is_conv1d(base_layer))
        self.base_layer = base_layer.requires_grad_(False)
        self._shared_input = None  # set by shared_input.SharedInput for the time of a call of the block
        self._parallel = None  # set by the styles of parallel.py: the forward on local shards
        self.train(base_layer.training)

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
        call = self.linear_call(x)
        if call is not None:
            return linear(x, *call)
        y = self.base_layer(x)
        check_gives_gradient(self.base_layer, x, y)
        return lora(x, *self.call(), base=y, inplace=self._base_output_is_ours(y))

    def linear_call(self, x: Tensor) -> LinearCall | None:
        """Return what ``linear(x, ...)`` takes beside x, or None where the layer computes in another way: it is merged
        or sharded, or its base layer cannot be left out."""
        if self._merged or self._parallel is not None:
            return None
        base = self._modules["base_layer"]
        weight = frozen_weight(base, x)
        if weight is None:
            return None
        bias, a, b = parameter_of(base, "bias"), parameter_of(self, "lora_a"), parameter_of(self, "lora_b")
        return LinearCall(weight, bias, a, b, self.coefficient(), self.options)

    def plan(self, x: Tensor) -> Plan:
        """Return what ``self(x)`` would do."""
        if self._merged:
            return Plan("torch", "merged", "the branch is part of the frozen weight")
        planned = plan_of(x, self.lora_a, self.lora_b, self.identity, self.options)
        return replace(planned, frozen=way_of(self.base_layer, x))

    def merged_weight(self) -> Tensor:
        """Return the weight that :meth:`merge` would write, checked, in the layout of the base
        layer's weight.

        Raises:
            ValueError: as in :meth:`merge`.
        """
        self.check_merge()
        (merged,) = self._sums()
        return merged

    def check_merge(self, dequantize: bool | torch.dtype = False) -> None:
        if dequantize is not False and is_dequantizable(self.base_layer):
            self._check_identity()
            if is_repacked(self.base_layer):
                raise ValueError(f"merge: {REPACKED}")
            self._dense_sum(dequantize)
            return
        if "weight" not in self.base_layer._parameters and not is_quantized(self.base_layer):
            raise ValueError("merge: the base layer computes its weight (a parametrization); remove that first")
        reason = why_not_written(self.base_layer)
        if reason is not None:
            raise ValueError(f"merge: {reason}")
        super().check_merge()

    def merge_checked(self, keep_original: bool, dequantize: bool | torch.dtype = False) -> None:
        if self._merged or dequantize is False or not is_dequantizable(self.base_layer):
            super().merge_checked(keep_original)
            return
        dense, self.kept = self._dense_sum(dequantize)
        put_dense(self, dense)
        self._merged = True

    def _dense_sum(self, dequantize: bool | torch.dtype) -> tuple[nn.Linear, Kept]:
        return dense_sum(self.base_layer, self.lora_a, self.lora_b, self.scaling, dequantize)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield self.weight, self.lora_a, self.lora_b

    def _brings_weight(self, state_dict: dict[str, Tensor], prefix: str) -> bool:
        return prefix + "base_layer.weight" in state_dict

    def _base_output_is_ours(self, y: Tensor) -> bool:
        """Whether the base layer's output may be accumulated into: a hook may keep it, another
        forward may save it, and what a backward hook watches is a view that autograd guards."""
        base = self.base_layer
        own = type(base).forward is nn.Linear.forward and "forward" not in base.__dict__ and not base._forward_hooks
        return own and not torch.compiler.is_compiling() and not is_view(y)
