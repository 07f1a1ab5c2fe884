"""What layers, those that share x and the variant for PEFT ask of the frozen layer beside a branch."""

import torch
from torch import Tensor, nn

from afa_kernels.operator import checks

ORDINARY = (nn.Parameter, Tensor)
IN_FULL_PRECISION = "Save the adapter and merge it into the model in full precision"
REPACKED = (
    "bitsandbytes repacked its weight for inference on this processor (AVX512-BF16), in an evaluation whose x needed "
    "no gradient. Load the model again, and set support_avx512bf16_for_cpu = False on its Linear4bit layers before the "
    "first evaluation"
)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, a linear layer with its weight as (K, N)."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2
    )


def is_plain(module: nn.Module) -> bool:
    """Whether ``module(x)`` is ``x @ W.T + bias`` and nothing else sees or changes it on the way.

    Sharding, offloading and tensor parallelism hook into a layer; its weight may then be whole during a call only.
    """
    return (type(module) is nn.Linear or is_conv1d(module)) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something sees or changes a call of ``module`` on the way."""
    own = module.__dict__
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of a module, without ``nn.Module.__getattr__``, which takes several times as long as a look
    into a dictionary; an attribute that sharding has put in its place, too."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer or a Conv1D as ``(N, K)``."""
    weight = parameter_of(module, "weight")
    return weight if isinstance(module, nn.Linear) else weight.T


def plain_weight(module: nn.Module) -> Tensor | None:
    """Return the weight as ``(N, K)`` of a layer that computes ``x @ W.T + bias`` from an ordinary tensor, or None
    where the layer has to be called."""
    weight = weight_of(module) if is_plain(module) else None
    return weight if type(weight) in ORDINARY else None


def why_not_written(module: nn.Module) -> str | None:
    """Return why the weight of a layer cannot be overwritten by a sum, or None if it can."""
    weight, kind = getattr(module, "weight", None), ""  # HQQ's has another name
    if weight is not None:
        if weight.is_meta and hasattr(module, "_hf_hook"):
            return "accelerate has offloaded the weight; accelerate.hooks.remove_hook_from_submodules(model) first"
        if is_dense(weight):
            return None
        kind = f" ({type(weight).__name__})"
    return (
        f"{type(module).__name__} has a quantized weight{kind}, into which no sum can be written. {IN_FULL_PRECISION}, "
        "or merge with dequantize=True"
    )


def is_dense(weight: Tensor) -> bool:
    """Whether a weight holds floating-point numbers, whole or sharded. What is written into a quantized tensor that
    poses as one of these, as those of torchao and quanto do, is lost or refused."""
    return weight.dtype in checks.FLOATING and (type(weight) in ORDINARY or hasattr(weight, "device_mesh"))


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer whose weight is not in floating point. Quantization libraries have no base
    class for these in common."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return weight.dtype not in checks.FLOATING and not weight.is_complex()
    if not any(isinstance(getattr(module, name, None), int) for name in ("in_features", "infeatures")):
        return False
    own = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and t.dim() >= 2 and t.dtype not in checks.FLOATING for t in own)


def is_repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes has brought a 4-bit weight into a layout that its inference on a CPU alone understands: its
    forward then gives x no gradient, and dequantizing gives noise."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def check_gives_gradient(module: nn.Module, x: Tensor, y: Tensor | None = None) -> None:
    """Raise where a layer, with y its output if it has run, would leave its part out of the gradient of x.

    Raises:
        RuntimeError: x needs a gradient, and the layer cannot give one.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return
    if is_repacked(module):
        raise RuntimeError(f"x: it needs a gradient, which {type(module).__name__} cannot give: {REPACKED}")
    if y is not None and not y.requires_grad:
        weight = type(getattr(module, "weight", None)).__name__
        raise RuntimeError(
            f"x: it needs a gradient, and the output of {type(module).__name__} (weight: {weight}) has none: the layer "
            "is for inference only. Train on a base that is quantized in another way"
        )


class LikeItsBase:
    """Base of the layers that stand in for ``base_layer``: what code that inspects a linear layer expects to find."""

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias
