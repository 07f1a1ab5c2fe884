"""Merging adapters of this package in PEFT's layers: what is refused, what the weight keeps, and dense layers in the
place of quantized ones."""

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from afa_kernels.layers.base_layer import IN_FULL_PRECISION, REPACKED, is_repacked, why_not_written
from afa_kernels.layers.kept import Kept, kept, tell
from afa_kernels.layers.merging import check_dequantize, dense_sum, put_dense, put_quantized
from afa_kernels.layers.quantized import dequantized, is_dequantizable, quantized_anew
from afa_kernels.peft.tuner import not_linear

# PEFT's layers whose weight PEFT dequantizes, adds to and quantizes anew.
_QUANTIZED_ANEW = ("Linear8bitLt", "Linear4bit", "HqqLoraLinear", "TorchaoLoraLinear")


class Merging:
    """Mixed into PEFT's LoRA layers as a part of :class:`afa_kernels.peft.AFALoraLayer`."""

    kept: Kept | None = None  # of all merged adapters, in the weight
    _quantized: nn.Module | None = None  # the base layer, while a dense one with the sum is in its place

    def check_merge(self, adapter_names: list[str] | None = None, dequantize: bool | torch.dtype = False) -> None:
        """Raise the ValueError with which :meth:`merge` would refuse to begin."""
        names = adapter_names or self.active_adapters
        for name in self._ours(names):
            self._require_identity("merge", name)
        reason = _why_not_merged(self, dequantize is not False)
        other = next((self.lora_variant[name] for name in names if self._changes_more(name)), None)
        if reason is None and other is not None and self._becomes_dense(dequantize):
            reason = f"dequantize=True adds adapters that are a LoRA or an AFA-LoRA, got a {type(other).__name__}"
        new = any(name in self.lora_A and name not in self.merged_adapters for name in names)
        if new and self.merged and (self._quantized is not None or self._becomes_dense(dequantize)):
            reason = f"dequantize=True merges adapters together; unmerge {', '.join(self.merged_adapters)} first"
        if reason is not None:
            raise ValueError(f"merge: {reason}")

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool | torch.dtype = False,
    ) -> None:
        """Merge adapters as PEFT does, measure what the weight kept of them, and warn where that is less than 0.9.

        Args:
            dequantize: put an ``nn.Linear`` with the dequantized weight and the adapters into the place of a quantized
                base layer; a dtype: in that one. :meth:`unmerge` puts the quantized layer back, as it was.
        """
        check_dequantize(dequantize)
        self.check_merge(adapter_names, dequantize)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if self._becomes_dense(dequantize):
            self._merge_into_dense(names, dequantize)
        else:
            measured = not any(map(self._changes_more, names))
            before, already = (self._weight_now().clone() if measured else None), list(self.merged_adapters)
            try:
                self._merge_each(names, safe_merge)
            finally:
                done = [name for name in self.merged_adapters if name not in already]
                if measured and done:
                    own = kept(before, self._weight_now(), *self._factors(done))
                    self.kept = Kept.of_all([own, self.kept or Kept()])
        tell(self)

    def _merge_each(self, names: list[str], safe_merge: bool) -> None:
        if stock_class(type(self)).__name__ not in _QUANTIZED_ANEW:
            super().merge(safe_merge=safe_merge, adapter_names=names)
            return
        for name in names:
            if name not in self.lora_afa:
                super().merge(safe_merge=safe_merge, adapter_names=[name])
                continue
            merged = self.lora_variant[name].merge_safe(self, name, dequantized(self.base_layer))
            before = list(self.merged_adapters)
            try:
                with quantized_anew(self, merged):
                    super().merge(safe_merge=safe_merge, adapter_names=[name])
            except RuntimeError:
                self.merged_adapters = before
                raise

    def _merge_into_dense(self, names: list[str], dequantize: bool | torch.dtype) -> None:
        dense, self.kept = dense_sum(self.base_layer, *self._factors(names), 1.0, dequantize)
        for name in names:
            own = self.lora_B[name].bias
            if own is not None:
                own = (own * self.scaling[name]).detach().to(dense.weight)
                dense.bias = nn.Parameter(own if dense.bias is None else dense.bias + own, requires_grad=False)
        put_dense(self, dense)
        self.merged_adapters += names

    def unmerge(self) -> None:
        if self.merged and is_repacked(self.get_base_layer()):
            raise ValueError(f"unmerge: {REPACKED}")
        if self._quantized is None:
            super().unmerge()
        else:
            put_quantized(self)
            self.merged_adapters.clear()
        self.kept = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        if adapter in self.lora_afa:
            self._require_identity("get_delta_weight", adapter)
        return super().get_delta_weight(adapter)

    def _becomes_dense(self, dequantize: bool | torch.dtype) -> bool:
        return dequantize is not False and is_dequantizable(self.get_base_layer())

    def _weight_now(self) -> Tensor:
        """Return the weight as ``(N, K)`` in floating point; not copied, if it is dense."""
        base = self.get_base_layer()
        weight = dequantized(base) if is_dequantizable(base) else base.weight
        return (weight.T if getattr(self, "fan_in_fan_out", False) else weight).detach()

    def _factors(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Return A and B whose product is the sum of ``scaling * B @ A`` of these adapters."""
        each = [(*self._factors_of(name), self.scaling[name]) for name in names]
        return torch.cat([a for a, _, _ in each], -2), torch.cat([b * scaling for _, b, scaling in each], -1)

    def _factors_of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight

    def _changes_more(self, name: str) -> bool:
        """Whether an adapter is none of this package and adds something else than ``scaling * B @ A``, as DoRA does."""
        return name not in self.lora_afa and name in self.lora_variant

    def _ours(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.lora_afa]

    def _require_identity(self, what: str, adapter: str) -> None:
        state = self.lora_afa[adapter]
        if not state.identity:
            raise ValueError(f"{what}: {not_linear(adapter, state.alpha_t)}")


def _why_not_merged(layer: LoraLayer, dequantize: bool) -> str | None:
    """Return why no branch can become part of a layer's weight, or None if PEFT can try."""
    stock, base = stock_class(type(layer)).__name__, layer.get_base_layer()
    if stock == "GPTQLoraLinear":
        return f"GPTQ quantizes with data that PEFT has not, so no sum can become GPTQ's. {IN_FULL_PRECISION}"
    if is_repacked(base):
        return REPACKED
    if stock != "Linear" or (dequantize and is_dequantizable(base)):
        return None
    return why_not_written(base)


def stock_class(cls: type) -> type:
    """Return PEFT's own class of a layer."""
    own = (c for c in cls.__mro__ if issubclass(c, LoraLayer) and not issubclass(c, Merging))
    return next(own)
