"""AFA-LoRA over a whole model: inject, anneal, merge, unmerge, unload."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from afa_kernels import checks
from afa_kernels.base_layer import is_conv1d
from afa_kernels.experts import AFAExpertLinear, seam
from afa_kernels.experts.layer import AFAExperts, check_expert_rank, rank_of_expert
from afa_kernels.experts.targets import find_parameters
from afa_kernels.layer import AFALinear, check_options
from afa_kernels.shared_input import attach_groups, groups_of, nothing_to_share, unshare_inputs
from afa_kernels.targets import ALL_LINEAR, Candidate, find_targets, trainable_modules

_TRAINABLE_MARK = "_afa_trainable"
_FAST_PATH_MARK = "_afa_fast_path"
_Layer = AFALinear | AFAExpertLinear
_KINDS = (AFALinear, AFAExpertLinear)


def inject(
    model: nn.Module,
    target_modules: str | Iterable[str] | None = None,
    *,
    target_parameters: Iterable[str] = (),
    r: int = 8,
    lora_alpha: float = 16,
    activation: str = "silu",
    dropout: float = 0.0,
    use_rslora: bool = False,
    trainable: str | Iterable[str] = (),
    exclude_modules: str | Iterable[str] = (),
    dtype: torch.dtype | None = None,
    save: str = "z",
    backend: str | None = None,
    group: bool | None = None,
    expert_rank: str = "same",
) -> nn.Module:
    """Replace linear layers of ``model`` in place by :class:`AFALinear`, give the experts of a mixture their branches,
    and freeze everything else.

    Args:
        target_modules: names (a module matches that is called so or ends in ``"." + name``), a
            regular expression (a string, matched against whole names), or ``"all-linear"``: every
            supported layer except the output head (``get_output_embeddings()``, or modules called
            lm_head, score or classifier) and layers that cannot be adapted (tied weights, inside
            ``nn.MultiheadAttention``). By default ``"all-linear"``, or none where ``target_parameters`` are given.
        target_parameters: names of fused expert parameters of a model of transformers 5, such as
            ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``, matched as names of modules are. Each expert gets
            its own A and B (:class:`AFAExpertLinear`); routers and shared experts stay as they are.
        expert_rank: ``"same"``: each expert has rank r; ``"per_active"``: ``max(1, r // num_experts_per_tok)``, so that
            a token meets about r columns of A in all.
        trainable: names or regular expression of modules to train in full, a classification head
            for example. No layer inside them is adapted; :func:`save_adapter` saves them (PEFT's
            ``modules_to_save``).
        exclude_modules: names or regular expression of modules not to adapt.
        group: let q, k and v, and gate and up, of the common transformer blocks share their passes over x where a
            backend takes them together (see :func:`afa_kernels.share_inputs`). None: where there are such layers and no
            dropout; True: it is an error if there are none; False: not at all.
        r, lora_alpha, activation, dropout, use_rslora, dtype, save, backend: as in
            :class:`AFALinear`.

    Returns:
        ``model``, at ``alpha_t = 1`` with ``lora_b = 0``: its outputs are unchanged.

    Raises:
        TypeError: a named module is of another kind.
        ValueError: nothing matches, the model has AFA layers already, or a named module shares its
            weight, is registered twice, or is read by its parent without being called; ``group=True``
            with nothing to group, or with dropout, which leaves nothing to share. The model is then
            unchanged.
    """
    check_options(r, lora_alpha, activation, dropout, save, backend)
    check_expert_rank(expert_rank)
    if dtype is not None and dtype not in checks.FLOATING:
        raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
    if any(isinstance(m, _KINDS) for m in model.modules()):
        raise ValueError("model: it has AFA layers already; unload(model) first")
    trained = trainable_modules(model, trainable)
    parameters = find_parameters(model, target_parameters, trained)
    targets = []
    if target_modules or not parameters:
        wanted = ALL_LINEAR if target_modules is None else target_modules
        targets = find_targets(model, wanted, exclude_modules, trained)
    ranks = [rank_of_expert(target.experts, r, expert_rank) for target in parameters]
    if group:
        _check_group(model, targets, dropout)

    options = (lora_alpha, activation, dropout, use_rslora)
    keywords = {"dtype": dtype, "save": save, "backend": backend}
    replace(model, targets, trained, lambda _name, module: AFALinear(module, r, *options, **keywords))
    for target, rank in zip(parameters, ranks, strict=True):
        add_to_experts(AFAExpertLinear(target.experts, target.parameter, rank, *options, **keywords))
    if group is not False and not dropout:
        attach_groups(model, AFALinear)
    return model


def _check_group(model: nn.Module, targets: list[Candidate], dropout: float) -> None:
    if dropout > 0.0:
        raise ValueError(
            f"group: dropout draws one mask for each layer, so no product over x can be shared; got dropout={dropout}"
        )
    children: dict[nn.Module, dict[str, int]] = {}
    for target in targets:
        in_features = target.module.weight.shape[0 if is_conv1d(target.module) else 1]
        children.setdefault(target.parent, {})[target.attribute] = in_features
    if not any(list(groups_of(sizes)) for sizes in children.values()):
        raise ValueError(nothing_to_share(model))


def replace(
    model: nn.Module,
    targets: list[Candidate],
    trained: list[str],
    make: Callable[[str, nn.Module], AFALinear],
) -> None:
    """Freeze ``model`` but for ``trained``, and put ``make(name, module)`` at each target."""
    model.requires_grad_(False)
    for name in trained:
        module = model.get_submodule(name)
        module.requires_grad_(True)
        setattr(module, _TRAINABLE_MARK, True)
    for target in targets:
        setattr(target.parent, target.attribute, make(target.name, target.module))
    _leave_fast_paths(model)


def add_to_experts(layer: AFAExpertLinear) -> None:
    """Let the experts module of ``layer`` compute with it."""
    if not hasattr(layer.experts, "afa"):
        seam.attach(layer.experts, AFAExperts())
    layer.experts.afa[layer.parameter] = layer


def set_alpha_t(model: nn.Module, value: float) -> None:
    """Set the blend coefficient of every layer of ``model`` that has ``set_alpha_t``: AFA layers,
    and the layers of a PEFT model with an :class:`afa_kernels.peft.AFALoraConfig`.

    Raises:
        TypeError, ValueError: ``value`` is no number in [0, 1], is not 0 while a layer is merged,
            or the model has no such layer. No layer is changed then.
    """
    named = model.named_modules()
    layers = [(name, m) for name, m in named if callable(getattr(m, "set_alpha_t", None))]
    if not layers:
        raise _nothing_found(model)
    value = checks.alpha_value(value)
    merged = [name for name, layer in layers if layer.merged]
    if merged and value != 0.0:
        raise ValueError(f"alpha_t: {merged[0]} is merged, got {value}; unmerge(model) first")
    for _, layer in layers:
        layer.set_alpha_t(value)


def merge(model: nn.Module, *, keep_original: bool = False) -> nn.Module:
    """Merge every AFA layer of ``model``: it then costs what the frozen model costs.

    Args:
        keep_original: keep a copy of each weight for a bit-exact :func:`unmerge` (see
            :meth:`AFALinear.merge`).

    Raises:
        ValueError: a layer cannot be merged (``alpha_t`` is not 0, say). No layer is changed then.
    """
    layers = _layers(model)
    for name, layer in layers:
        if not layer.merged:
            # Computed here to be checked and again to be written, so that no copy of the whole
            # model is held.
            _named(name, layer.check_merge)
        elif keep_original:
            _named(name, lambda layer=layer: layer.merge(keep_original=True))
    for _, layer in layers:
        layer.merge(keep_original=keep_original)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`: bit for bit if it kept the originals, by subtraction otherwise."""
    for _, layer in _layers(model):
        layer.unmerge()
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the AFA layers out of ``model`` and put their base layers back.

    After :func:`merge` the base layers hold the merged weights, so the model keeps what it learned;
    without it the branches are dropped, and the model is the one that was injected. Parameters stay
    frozen as they are.

    Raises:
        ValueError: the model has no AFA layer, only some of them are merged, or one is sharded for
            tensor parallelism. The model is unchanged then.
    """
    layers = _layers(model)
    if len({layer.merged for _, layer in layers}) > 1:
        name = next(name for name, layer in layers if not layer.merged)
        raise ValueError(f"model: some layers are merged and {name} is not; merge(model) or unmerge(model) first")
    sharded = next((name for name, layer in layers if getattr(layer, "_parallel", None) is not None), None)
    if sharded is not None:
        raise ValueError(
            f"model: {sharded} is sharded by a style of afa_kernels.parallel, which its base layer "
            "does not know; save_adapter(model) and load it into a whole model"
        )
    if isinstance(model, AFALinear):
        return model.base_layer
    unshare_inputs(model)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, AFALinear):
                child.base_layer.train(child.training)
                setattr(parent, attribute, child.base_layer)
            elif isinstance(child, AFAExperts):
                seam.detach(parent)
        for attribute, value in parent.__dict__.pop(_FAST_PATH_MARK, {}).items():
            setattr(parent, attribute, value)
        parent.__dict__.pop(_TRAINABLE_MARK, None)
    return model


def named_layers(model: nn.Module) -> Iterator[tuple[str, _Layer]]:
    """Yield the AFA layers of ``model`` with the names of the modules and parameters that they adapt."""
    for name, module in model.named_modules():
        if isinstance(module, AFALinear):
            yield name, module
        elif isinstance(module, AFAExpertLinear):
            yield (name.removesuffix(f"afa.{module.parameter}") + module.parameter), module


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
        if isinstance(module, AFALinear):
            covered.append(f"{name}.")
            own = module.base_layer.named_parameters(f"{name}.base_layer")
        elif getattr(module, _TRAINABLE_MARK, False):
            covered.append(f"{name}.")
            yield name, module
            continue
        else:
            own = module.named_parameters(name, recurse=False)
        trains = [parameter_name for parameter_name, p in own if p.requires_grad]
        if not trains:
            continue
        if not name or any(isinstance(m, _KINDS) for m in module.modules()):
            raise ValueError(
                f"{trains[0]} trains, but a LoRA checkpoint holds, beside the branches, only whole "
                "modules without AFA layers"
            )
        covered.append(f"{name}.")
        yield name, module


def marked_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that :func:`inject` was told to train in full."""
    return [name for name, module in model.named_modules() if getattr(module, _TRAINABLE_MARK, False)]


def _layers(model: nn.Module) -> list[tuple[str, _Layer]]:
    layers = list(named_layers(model))
    if not layers:
        raise _nothing_found(model)
    return layers


def _nothing_found(model: nn.Module) -> ValueError:
    return ValueError(f"model: expected AFA layers, found none in {type(model).__name__}; inject(model) adds them")


def _named(name: str, action) -> None:
    try:
        action()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _leave_fast_paths(model: nn.Module) -> None:
    """Make torch's encoder call its linear layers in evaluation too: its fused path reads their
    weights instead."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            attribute, off = "use_nested_tensor", False
        elif isinstance(module, nn.TransformerEncoderLayer):
            attribute, off = "activation_relu_or_gelu", 0
        else:
            continue
        if any(isinstance(m, AFALinear) for m in module.modules()):
            setattr(module, _FAST_PATH_MARK, {attribute: getattr(module, attribute, off)})
            setattr(module, attribute, off)
