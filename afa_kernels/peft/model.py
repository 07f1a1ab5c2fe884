"""PEFT models as a whole: plain LoRA on the kernels of this package and back, and loading."""

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from afa_kernels.peft.config import AFALoraConfig
from afa_kernels.peft.layer import AFALoraLayer, AFALoraVariant, install, release, why_not


def accelerate(model: nn.Module) -> nn.Module:
    """Let the LoRA layers of an existing PEFT model run on the kernels of this package.

    Every plain LoRA adapter of a layer that has PEFT's seam for it is taken over; it computes what
    it did before (``alpha_t = 0``: plain GEMMs, accumulated in place). Adapters with an
    :class:`AFALoraConfig` that PEFT before 0.19 added to existing layers get their activation.
    Everything else (DoRA, embeddings, convolutions, ranks over 256) stays as it is. :func:`restore`
    undoes it.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: there is nothing in ``model`` to take over.
    """
    taken = 0
    reasons: set[str] = set()
    for layer, configs in _lora_layers(model):
        for name in layer.r:
            if name in layer.lora_variant:
                taken += isinstance(layer.lora_variant[name], AFALoraVariant)
                continue
            config = configs.get(name)
            annealed = config if isinstance(config, AFALoraConfig) else None
            reason = why_not(layer, name)
            if reason is None:
                install(layer, name, annealed)
                taken += 1
            elif annealed is not None:
                raise ValueError(f"adapter {name!r}: {reason}")
            else:
                reasons.add(reason)
    if not taken:
        found = "; ".join(sorted(reasons)) or "it has no LoRA layers"
        raise ValueError(f"model: nothing to run on the kernels in {type(model).__name__}: {found}")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: plain LoRA adapters run on PEFT's own code again, annealed ones stay.

    Returns:
        ``model``, changed in place.
    """
    for layer, _ in _lora_layers(model):
        if not isinstance(layer, AFALoraLayer):
            continue
        for name in [name for name, state in layer.lora_afa.items() if not state.annealed]:
            del layer.lora_afa[name]
            del layer.lora_variant[name]
        if not layer.lora_afa:
            release(layer)
    return model


def load_adapter(
    model: PeftModel, path: str, adapter_name: str, *, is_trainable: bool = False
) -> PeftModel:
    """Load a saved AFA-LoRA adapter into a PEFT model as another adapter, with its activation and
    its alpha_t.

    ``model.load_adapter(path, adapter_name)`` of PEFT reads the same files as a plain LoRA. For the
    first adapter of a model: ``PeftModel.from_pretrained(base, path,
    config=AFALoraConfig.from_pretrained(path))``.
    """
    config = AFALoraConfig.from_pretrained(path)
    config.inference_mode = not is_trainable
    model.add_adapter(adapter_name, config)
    accelerate(model)
    model.load_adapter(path, adapter_name, is_trainable=is_trainable)
    return model


def _lora_layers(model: nn.Module) -> Iterator[tuple[LoraLayer, dict]]:
    """Yield the LoRA layers of ``model``, each with the configurations of the model around it."""
    configs = next(
        (m.peft_config for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)),
        {},
    )
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            yield module, configs
