"""Frozen layers whose weight a library keeps quantized: which of them are dequantized for the products of a call.

A layer of such a library computes its output by itself. The branch then reads and writes that output once more, and
autograd adds the branch's part to the layer's gradient of x. Where the layer dequantizes anyway, it is cheaper to let
it do only that, in the forward and again in the backward, and to take the path of a dense layer, which accumulates in
place. What was dequantized lives for one product.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from afa_kernels.layers.base_layer import has_hooks, is_dense, is_quantized, is_repacked, plain_weight, weight_of
from afa_kernels.operator.checks import FLOATING
from afa_kernels.operator.quantized_weight import QuantizedWeight

# Below so many rows, and where no gradient is recorded, a library's own product is faster than dequantizing: that of
# one token reads the quantized weight once.
_ROWS = 32


class Kind(NamedTuple):
    """How layers of one class, or with one class of weights, are dequantized."""

    maker: Callable[[nn.Module], Callable[[], Tensor]] | None  # holds what the layer has at the time of the call
    own: str = ""  # why the layer computes its own product


def _bitsandbytes_4bit(module: nn.Module) -> Callable[[], Tensor]:
    from bitsandbytes import functional

    data, state = module.weight.data, module.weight.quant_state
    return lambda: functional.dequantize_4bit(data, state)


def _bitsandbytes_8bit(module: nn.Module) -> Callable[[], Tensor]:
    from bitsandbytes import functional

    data, scales = module.weight.data, module.weight.SCB if module.state.SCB is None else module.state.SCB
    return lambda: functional.int8_vectorwise_dequant(data, scales)


def _hqq(module: nn.Module) -> Callable[[], Tensor]:
    return module.dequantize


def _tensor(module: nn.Module) -> Callable[[], Tensor]:
    return module.weight.dequantize


def _transformers_fp8(module: nn.Module) -> Callable[[], Tensor]:
    weight, scales, block = module.weight.data, module.weight_scale_inv.data, module.block_size

    def make() -> Tensor:
        dense = weight.float()
        if block is None:
            return dense.mul_(scales.float())
        for rows, row_scales in zip(dense.split(block[0]), scales.float(), strict=True):
            rows.mul_(row_scales.repeat_interleave(block[1])[: dense.shape[1]])
        return dense

    return make


_SLOW = "to dequantize it takes longer than its own product"
# By the library and the class of the layer; of an nn.Linear, of its weight.
KINDS = {
    ("bitsandbytes", "Linear4bit"): Kind(_bitsandbytes_4bit),
    ("bitsandbytes", "Linear8bitLt"): Kind(_bitsandbytes_8bit),
    ("hqq", "HQQLinear"): Kind(_hqq),
    ("optimum", "QLinear"): Kind(_tensor),
    ("transformers", "FP8Linear"): Kind(_transformers_fp8),
    ("torchao", "AffineQuantizedTensor"): Kind(_tensor),
    ("torchao", "Int4Tensor"): Kind(_tensor),
    ("torchao", "IntxUnpackedToInt8Tensor"): Kind(_tensor),
    ("torchao", "Int8Tensor"): Kind(_tensor, _SLOW),
    ("torchao", "Float8Tensor"): Kind(_tensor, _SLOW),
}


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a layer whose weight is quantized, or None of any other."""
    cls = type(module)
    if cls is nn.Linear:
        cls = type(module._parameters.get("weight"))
    return KINDS.get((cls.__module__.partition(".")[0], cls.__name__))


def why_own(module: nn.Module, x: Tensor) -> str | None:
    """Return why a quantized layer computes its product with x itself, or None if its weight is dequantized for it."""
    kind = kind_of(module)
    if kind is None:
        return "no way to dequantize it is known"
    if is_compiling():
        return "a compiled graph cannot drop what was dequantized"
    if not torch.is_grad_enabled() and x.numel() < _ROWS * x.shape[-1]:
        return f"fewer than {_ROWS} rows and no gradient"
    if kind.own:
        return kind.own
    if has_hooks(module):
        return "it has hooks or a forward of its own"
    if is_repacked(module):
        return "its weight is repacked for inference"
    if kind.maker is _hqq:
        return None
    weight = module._parameters["weight"]
    if _is_dense(weight):
        return "its weight is not quantized"
    marks = (module, "activation_qtype"), (weight, "activation_quantization"), (weight, "act_quant_kwargs")
    if any(getattr(owner, name, None) is not None for owner, name in marks):
        return "it quantizes x too"
    return None


def _is_dense(weight: Tensor) -> bool:
    """Whether a weight that a library is to quantize, or to leave as it is, is not quantized."""
    name = type(weight).__name__
    if name == "Params4bit":
        return weight.quant_state is None
    return weight.dtype in FLOATING and name in ("Int8Params", "Parameter", "Tensor")


def frozen_weight(module: nn.Module, x: Tensor) -> Tensor | QuantizedWeight | None:
    """Return the weight ``(N, K)`` with which a call on x multiplies, or None where the layer has to be called."""
    weight = plain_weight(module)
    if weight is not None:
        return weight
    kind = kind_of(module)
    if kind is None or why_own(module, x) is not None:
        return None
    return QuantizedWeight((module.out_features, module.in_features), _device(module), kind.maker(module))


def way_of(module: nn.Module, x: Tensor) -> str:
    """Return how a call on x multiplies with a quantized weight, and why; an empty text where it is not quantized."""
    if kind_of(module) is None and not is_quantized(module) and is_dense(module.weight):
        return ""
    reason = why_own(module, x)
    return "dequantized: the product accumulates in place" if reason is None else f"the layer's own: {reason}"


def weight_like(module: nn.Module) -> Tensor:
    """Return the weight ``(N, K)`` of a layer; of a quantized one, a tensor without memory that looks like it."""
    if not is_quantized(module):
        return weight_of(module)
    return torch.empty((), device=_device(module)).expand(module.out_features, module.in_features)


def _device(module: nn.Module) -> torch.device:
    return module.W_q.device if hasattr(module, "W_q") else module.weight.device
