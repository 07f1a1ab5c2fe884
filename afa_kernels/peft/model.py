"""PEFT models as a whole: plain LoRA on the kernels of this package and back, an activation for it, and loading."""

import dataclasses
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn

from afa_kernels.model.mlp import attach_mlps, mlps_of, unfuse_mlp
from afa_kernels.model.sharing import attach_shared_inputs, detach_shared_inputs
from afa_kernels.peft import experts
from afa_kernels.peft.config import AFALoraConfig
from afa_kernels.peft.layer import AFALoraLayer, install, release, why_not
from afa_kernels.peft.tuner import adopt_tuners


def accelerate(model: nn.Module, *, fuse_mlp: bool = False) -> nn.Module:
    """Let the LoRA layers of an existing PEFT model run on the kernels of this package.

    Every plain LoRA adapter of a layer that has PEFT's seam for it is taken over, and those of fused experts
    (``target_parameters``); it computes what it did before (``alpha_t = 0``: no activation). Layers that read the same
    x share their passes over it (:func:`afa_kernels.share_inputs`). Adapters with an :class:`AFALoraConfig` that PEFT
    before 0.19 added to existing layers get their activation. Everything else (DoRA, embeddings, convolutions) stays
    as it is. :func:`restore` undoes it.

    Args:
        model: a PEFT model.
        fuse_mlp: run each MLP block ``down(act(gate(x)) * up(x))`` whose layers are adapted as one call that keeps less
            for the backward (:func:`afa_kernels.fuse_mlp`).

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: there is nothing in ``model`` to take over, or with ``fuse_mlp=True`` nothing to fuse.
    """
    blocks = mlps_of(model, LoraLayer) if fuse_mlp else {}
    install_annealed(model)
    reasons: set[str] = set()
    for layer, name in _plain_adapters(model):
        is_parameter = isinstance(layer, lora.ParamWrapper)
        reason = experts.adopt(layer) if is_parameter else why_not(layer)
        if reason is not None:
            reasons.add(reason)
        elif not is_parameter:
            install(layer, name, None)
    if not any(isinstance(module, AFALoraLayer) for module in model.modules()):
        found = "; ".join(sorted(reasons)) or "it has no plain LoRA layers"
        raise ValueError(f"model: nothing to run on the kernels in {type(model).__name__}: {found}")
    _prepare(model)
    return attach_mlps(model, blocks)


def add_activation(
    model: nn.Module, activation: str = "silu", *, adapter: str | None = None, **options: Any
) -> nn.Module:
    """Give LoRA adapters of an existing PEFT model an activation, as if they had been made with an
    :class:`AFALoraConfig`: for frameworks that make the adapters themselves.

    Names and parameters stay as they are, so an optimizer may exist already. An adapter that has been trained computes
    another function afterwards, until its alpha_t is 0 again.

    Args:
        model: a PEFT model, changed in place.
        activation: a name from :func:`afa_kernels.activations`.
        adapter: the adapter; by default the active ones.
        **options: other fields of :class:`AFALoraConfig`, such as ``anneal_end_frac``.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: an option does not fit, or an adapter cannot have an activation. Nothing is changed then.
    """
    layers = _lora_layers(model)
    names = {name for layer in layers for name in ([adapter] if adapter else layer.active_adapters) if name in layer.r}
    if not names:
        wanted = f"a LoRA adapter {adapter!r}" if adapter else "active LoRA adapters"
        raise ValueError(f"model: expected {wanted}, found none in {type(model).__name__}")
    configs = _configs(model)
    made = {name: _with_activation(name, configs.get(name), activation, options) for name in sorted(names)}
    places = [(layer, name) for layer in layers for name in made if name in layer.r]
    routers = [layer for layer, _ in places if experts.is_router_wrapper(layer)]
    # Where there are routers alone, the error below names the first one.
    places = [(layer, name) for layer, name in places if layer not in routers] or places
    for layer, name in places:
        reason = experts.why_not_wrapper(layer) if isinstance(layer, lora.ParamWrapper) else why_not(layer)
        if name in layer.merged_adapters:
            reason = "it is merged; unmerge_adapter() first"
        if reason is not None:
            raise ValueError(f"adapter: {name!r} cannot have an activation: {reason}")
    for layer in routers:
        experts.warn_of_router(layer.get_base_layer())
    for layer, name in places:
        (experts.install if isinstance(layer, lora.ParamWrapper) else install)(layer, name, made[name])
    configs.update(made)
    _prepare(model)
    return model


def _with_activation(name: str, plain: Any, activation: str, options: dict[str, Any]) -> AFALoraConfig:
    """Return the configuration of a plain LoRA adapter with an activation."""
    if type(plain) is not LoraConfig:
        raise ValueError(f"adapter: expected {name!r} to be a plain LoRA, got its {type(plain).__name__}")
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(LoraConfig) if field.init}
    return AFALoraConfig(**fields, activation=activation, **options)


def install_annealed(model: nn.Module) -> None:
    """Prepare a model with an :class:`AFALoraConfig`, where PEFT shows no more than one layer at a time.

    Layers that read the same x share their passes over it (:func:`afa_kernels.share_inputs`), and ``adapter_names`` may
    be given in training too. And adapters get their
    activation whose configuration never reached their layer: PEFT before 0.19 does not pass the configuration of
    another adapter to a layer that exists, so that layer would run it as a plain LoRA.

    Raises:
        ValueError: a layer cannot run such an adapter.
    """
    configs = _configs(model)
    for layer, name in _plain_adapters(model):
        config = configs.get(name)
        if isinstance(config, AFALoraConfig) and not experts.is_router_wrapper(layer):
            if not config.describes_an_adapter:
                config = configs[name] = config.own_copy()
            install(layer, name, config)
    _prepare(model)


def _prepare(model: nn.Module) -> None:
    """Do what needs a whole model."""
    attach_shared_inputs(model, AFALoraLayer)
    adopt_tuners(model)
    if any(getattr(config, "fuse_mlp", False) for config in _configs(model).values()):
        attach_mlps(model, mlps_of(model, AFALoraLayer))


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: plain LoRA adapters run on PEFT's own code again.

    Annealed adapters stay as they are.

    Returns:
        ``model``, changed in place.
    """
    unfuse_mlp(model, AFALoraLayer)
    detach_shared_inputs(model, AFALoraLayer)
    for layer in _lora_layers(model):
        if isinstance(layer, experts.ParamWrapper):
            experts.release(layer)
            continue
        if not isinstance(layer, AFALoraLayer):
            continue
        for name in [name for name, state in layer.lora_afa.items() if state.config is None]:
            del layer.lora_afa[name]
            del layer.lora_variant[name]
        if not layer.lora_afa:
            release(layer)
    _prepare(model)
    return model


def load_adapter(model: PeftModel, path: str, adapter_name: str, *, is_trainable: bool = False) -> PeftModel:
    """Load a saved AFA-LoRA adapter into a PEFT model as another adapter, with its activation and
    its alpha_t.

    ``model.load_adapter(path, adapter_name)`` of PEFT reads the same files as a plain LoRA. For the
    first adapter of a model: ``PeftModel.from_pretrained(base, path,
    config=AFALoraConfig.from_pretrained(path))``.
    """
    config = AFALoraConfig.from_pretrained(path)
    config.inference_mode = not is_trainable
    model.add_adapter(adapter_name, config)
    install_annealed(model)
    model.load_adapter(path, adapter_name, is_trainable=is_trainable)
    return model


def _configs(model: nn.Module) -> dict[str, Any]:
    """Return the configurations of a model's adapters, as PEFT itself keeps them."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    return next((each for each in found if isinstance(each, dict)), {})


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _plain_adapters(model: nn.Module) -> list[tuple[LoraLayer, str]]:
    """Return the adapters that PEFT runs without a variant, with their layers."""
    return [
        (layer, name)
        for layer in _lora_layers(model)
        for name in layer.r
        if name not in layer.lora_variant and not isinstance(layer, experts.ParamWrapper)
    ]
