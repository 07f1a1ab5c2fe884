"""Frozen layers whose weight a library keeps quantized: which of them are dequantized for the products of a call.

A layer of such a library computes its output by itself. The branch then reads and writes that output once more, and
autograd adds the branch's part to the layer's gradient of x. Where the layer dequantizes anyway, it is cheaper to let
it do only that, in the forward and again in the backward, and to take the path of a dense layer, which accumulates in
place. What was dequantized lives for one product.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from afa_kernels.layers.base_layer import (
    IN_FULL_PRECISION,
    ORDINARY,
    has_hooks,
    is_dense,
    is_quantized,
    is_repacked,
    plain_weight,
    weight_of,
)
from afa_kernels.operator.checks import FLOATING
from afa_kernels.operator.quantized_weight import QuantizedWeight

# Below so many rows, and where no gradient is recorded, a library's own product is faster than dequantizing: that of
# one token reads the quantized weight once.
_ROWS = 32


class Kind(NamedTuple):
    """How layers of one class, or with one class of weights, are dequantized."""

    maker: Callable[[nn.Module], Callable[[], Tensor]]  # what it returns holds what the layer has at that time
    own: str = ""  # why the layer computes its own product
    weight: str = ""  # the class of the layer's weight; FSDP shards a tensor of another class in its place


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
# By the library and the class of the layer; where that has tensors of its own, of its weight. docs/memory.md has what
# was measured.
KINDS = {
    ("bitsandbytes", "Linear4bit"): Kind(_bitsandbytes_4bit, weight="Params4bit"),
    ("bitsandbytes", "Linear8bitLt"): Kind(_bitsandbytes_8bit, "its own product, in 8 bits, is faster", "Int8Params"),
    ("hqq", "HQQLinear"): Kind(_hqq),
    ("transformers", "FP8Linear"): Kind(_transformers_fp8, weight="Parameter"),
    ("optimum", "WeightQBytesTensor"): Kind(_tensor),
    ("optimum", "WeightQBitsTensor"): Kind(_tensor, _SLOW),
    ("optimum", "TinyGemmWeightQBitsTensor"): Kind(_tensor, _SLOW),
    ("torchao", "IntxUnpackedToInt8Tensor"): Kind(_tensor),
    ("torchao", "AffineQuantizedTensor"): Kind(_tensor, _SLOW),
    ("torchao", "Int8Tensor"): Kind(_tensor, _SLOW),
    ("torchao", "Float8Tensor"): Kind(_tensor, _SLOW),
}


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a layer whose weight is quantized and whole, or None of any other."""
    cls, weight = type(module), module._parameters.get("weight")
    if cls is nn.Linear or cls.__name__ == "QLinear":
        cls = type(weight)
    kind = KINDS.get((cls.__module__.partition(".")[0], cls.__name__))
    if kind is None or not kind.weight:
        return kind
    if type(weight).__name__ != kind.weight:
        return None
    # Not quantized yet, or left as it is.
    dense = weight.quant_state is None if kind.weight == "Params4bit" else weight.dtype in FLOATING
    return None if dense else kind


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
    weight = module._parameters.get("weight")
    marks = (module, "activation_qtype"), (weight, "activation_quantization"), (weight, "act_quant_kwargs")
    if any(getattr(owner, name, None) is not None for owner, name in marks):
        return "it quantizes x too"
    return None


def frozen_weight(module: nn.Module, x: Tensor) -> Tensor | QuantizedWeight | None:
    """Return the weight ``(N, K)`` with which a call on x multiplies, or None where the layer has to be called."""
    weight = plain_weight(module)
    if weight is not None:
        return weight
    if why_own(module, x) is not None:
        return None
    make = kind_of(module).maker(module)
    return QuantizedWeight((module.out_features, module.in_features), _device(module), make)


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


# --- merging into a quantized weight


def is_dequantizable(module: nn.Module) -> bool:
    """Whether the weight of a layer is quantized in a way that :func:`dequantized` knows."""
    weight = getattr(module, "weight", None)
    poses = type(weight) not in ORDINARY and hasattr(weight, "dequantize") and not is_dense(weight)
    return kind_of(module) is not None or poses


def dense_dtype(module: nn.Module, model: nn.Module | None = None) -> torch.dtype | None:
    """Return in which dtype a dense layer stands in for a quantized one, None where it is that of :func:`dequantized`.

    An 8-bit layer of bitsandbytes takes x in any dtype and has forgotten its own. Its bias has it, or ``model``, in the
    first of its floating-point parameters; else it is float16, in which that layer computes.
    """
    if type(getattr(module, "weight", None)).__name__ != "Int8Params":
        return None
    if module.bias is not None:
        return module.bias.dtype
    own = () if model is None else (p.dtype for p in model.parameters() if p.dtype in FLOATING)
    return next(iter(own), torch.float16)


def dequantized(module: nn.Module) -> Tensor:
    """Return the weight of a quantized layer in floating point, as its library gives it."""
    kind = kind_of(module)
    return module.weight.dequantize() if kind is None else kind.maker(module)()


def quantized_like(module: nn.Module, weight: Tensor) -> Tensor | None:
    """Return ``weight`` as a layer of bitsandbytes or HQQ would hold it, in floating point; None of other layers."""
    if hasattr(module, "W_q"):
        config = copy.deepcopy(module.quant_config)
        options = {"compute_dtype": module.compute_dtype, "device": module.device}
        anew = type(module)(None, {**config, "offload_meta": module.offload_meta}, **options)
        anew.quantize(weight, **config)
        return anew.dequantize()
    own = module.weight
    if type(own).__name__ not in ("Params4bit", "Int8Params"):
        return None
    from bitsandbytes import functional

    if type(own).__name__ == "Int8Params":
        return functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(weight.half())[:2])
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, **{n: getattr(own, n) for n in names}))


@contextmanager
def quantized_anew(owner: nn.Module, merged: Tensor) -> Iterator[None]:
    """Check that ``owner.base_layer``, which is quantized anew in the meantime, holds ``merged`` as well as that
    quantization can.

    Raises:
        RuntimeError: it does not. The base layer is then what it was.
    """
    base, merged = owner.base_layer, merged.detach().float()
    parts = (base, base._parameters.get("weight"), getattr(base, "state", None))  # bitsandbytes changes all three
    held = [base._parameters, *(vars(part) for part in parts if part is not None)]
    before = [dict(each) for each in held]
    yield
    best = quantized_like(owner.base_layer, merged)
    if best is None:
        return
    error, least = (torch.dist(weight.float(), merged) for weight in (dequantized(owner.base_layer), best))
    # The bound of this project's tests: kernels of a GPU may add in another order the second time.
    if not error <= 2 * least + torch.finfo(torch.float32).eps * merged.norm():
        owner.base_layer = base
        for each, values in zip(held, before, strict=True):
            each.update(values)
        raise RuntimeError(
            f"merge: {type(base).__name__} is {error:.2e} away from the sum that it should hold, and the sum quantized "
            f"anew {least:.2e}; the layer is left as it was. {IN_FULL_PRECISION}"
        )
