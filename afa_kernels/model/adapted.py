"""What of a model is adapted or trained: its AFA layers, and the modules that train beside them, by name."""

from collections.abc import Iterator

from torch import nn

from afa_kernels.experts import AFAExpertLinear, AFAExperts
from afa_kernels.experts.layer import BesideExperts
from afa_kernels.layers.base_layer import is_quantized
from afa_kernels.layers.branch import Branch
from afa_kernels.layers.linear import AFALinear
from afa_kernels.layers.quantized import is_dequantizable
from afa_kernels.layers.stack import AdapterStack, AFALinearStack

TRAINABLE_MARK = "_afa_trainable"  # of modules that inject was told to train in full
LAYERS = (AFALinear, AFALinearStack)
ADAPTED = (AFALinear, AFAExpertLinear, AdapterStack)


def named_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, Branch]]:
    """Yield the AFA layers of ``model`` with the names of the modules and parameters that they adapt; with ``adapter``,
    the branches of that adapter."""
    for name, module in _named_adapted(model):
        if not isinstance(module, AdapterStack):
            if adapter is None:
                yield name, module
        elif adapter in module.adapters:
            yield name, module.adapters[adapter]


def named_stacks(model: nn.Module) -> Iterator[tuple[str, AdapterStack]]:
    """Yield the stacks of ``model``, named as in :func:`named_layers`."""
    return ((name, module) for name, module in _named_adapted(model) if isinstance(module, AdapterStack))


def named_mergeable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of ``model`` that say what a merge kept, with their names; those of PEFT as the model has them
    that PEFT wraps."""
    of_peft = (each for each in model.named_modules() if hasattr(each[1], "lora_afa"))
    yield from ((name.removeprefix("base_model.model."), module) for name, module in of_peft)
    yield from named_layers(model)


def forget_quantization(model: nn.Module, was_dequantized: bool) -> None:
    """Let transformers save a model as a dense one where a merge has made all of its quantized layers dense."""
    forget = getattr(getattr(model, "hf_quantizer", None), "remove_quantization_config", None)
    if was_dequantized and forget and not any(is_quantized(m) or is_dequantizable(m) for m in model.modules()):
        forget(model)


def _named_adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, BesideExperts):
            yield name.removesuffix(f"afa.{module.parameter}") + module.parameter, module
        elif isinstance(module, ADAPTED):
            yield name, module


def named_trainable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that train beside the branches, marked by :func:`inject` or unfrozen.

    Raises:
        ValueError: a parameter trains that belongs to a module around AFA layers, or to the base of
            one.
    """
    covered: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in covered):
            continue
        if isinstance(module, AFAExperts):
            covered.append(f"{name}.")
            continue
        if isinstance(module, LAYERS):
            covered.append(f"{name}.")
            own = module.base_layer.named_parameters(f"{name}.base_layer")
        elif getattr(module, TRAINABLE_MARK, False):
            covered.append(f"{name}.")
            yield name, module
            continue
        else:
            own = module.named_parameters(name, recurse=False)
        trains = [parameter_name for parameter_name, p in own if p.requires_grad]
        if not trains:
            continue
        if not name or any(isinstance(m, ADAPTED) for m in module.modules()):
            raise ValueError(
                f"{trains[0]} trains, but a LoRA checkpoint holds, beside the branches, only whole "
                "modules without AFA layers"
            )
        covered.append(f"{name}.")
        yield name, module


def marked_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that :func:`inject` was told to train in full."""
    return [name for name, module in model.named_modules() if getattr(module, TRAINABLE_MARK, False)]
