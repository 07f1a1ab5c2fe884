"""AFA-LoRA over a whole model: inject and unload."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from afa_kernels.experts import AFAExpertLinear, AFAExperts, AFAExpertStack
from afa_kernels.experts.layer import check_expert_rank, rank_of_expert
from afa_kernels.experts.parameters import Target, find_parameters
from afa_kernels.experts.stack import check_names_of, check_no_names_of, check_whole
from afa_kernels.layers.branch import BranchOptions
from afa_kernels.layers.kept import told_together
from afa_kernels.layers.linear import AFALinear
from afa_kernels.layers.quantized import weight_like
from afa_kernels.layers.stack import AFALinearStack, check_name
from afa_kernels.model.adapted import (
    ADAPTED,
    LAYERS,
    TRAINABLE_MARK,
    forget_quantization,
    named_mergeable,
)
from afa_kernels.model.merge import nothing_found
from afa_kernels.model.mlp import attach_mlps, mlps_of, unfuse_mlp
from afa_kernels.model.sharing import attach_shared_inputs, nothing_to_share, siblings_of, unshare_inputs
from afa_kernels.model.targets import (
    ALL_LINEAR,
    Candidate,
    check_no_peft,
    find_targets,
    trainable_modules,
)

_FAST_PATH_MARK = "_afa_fast_path"


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
    backend: str | None = None,
    share_inputs: bool | None = None,
    fuse_mlp: bool = False,
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
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
        share_inputs: let q, k and v, and gate and up, of the common transformer blocks share their passes over x where
            a backend takes them together (see :func:`afa_kernels.share_inputs`). None: where there are such layers and
            no dropout; True: it is an error if there are none; False: not at all.
        fuse_mlp: run each MLP block ``down(act(gate(x)) * up(x))`` whose layers are adapted as one call that keeps less
            for the backward (:func:`afa_kernels.fuse_mlp`); it is an error if there are none.
        adapters: give each layer a stack of adapters (:class:`AFALinearStack`, :class:`AFAExpertStack`): their names,
            and for each the options of the next line in which it differs. :func:`adapters_of` says which one computes
            which sample.
        r, lora_alpha, activation, dropout, use_rslora, dtype, backend: as in
            :class:`AFALinear`.

    Returns:
        ``model``, at ``alpha_t = 1`` with ``lora_b = 0``: its outputs are unchanged.

    Raises:
        TypeError: a named module or parameter is of another kind.
        ValueError: nothing matches, ``"all-linear"`` would leave out quantized layers of an unknown kind, the model has
            AFA layers or adapters of PEFT already, or a named module shares its weight, is registered twice, or is read
            by its parent without being called; ``share_inputs=True`` with nothing to share, or with dropout, which
            leaves nothing to share; ``fuse_mlp=True`` with nothing to fuse. The model is then unchanged.
    """
    options = {
        "r": r,
        "lora_alpha": lora_alpha,
        "activation": activation,
        "dropout": dropout,
        "use_rslora": use_rslora,
        "dtype": dtype,
        "backend": backend,
    }
    if adapters is None:
        BranchOptions(**options)
    else:
        adapters = _each(adapters, options)
    check_expert_rank(expert_rank)
    if any(isinstance(m, ADAPTED) for m in model.modules()):
        raise ValueError("model: it has AFA layers already; unload(model) first")
    check_no_peft(model)
    trained = trainable_modules(model, trainable)
    parameters = find_parameters(model, target_parameters, trained)
    targets = []
    if target_modules or not parameters:
        wanted = ALL_LINEAR if target_modules is None else target_modules
        targets = find_targets(model, wanted, exclude_modules, trained)
    of_experts = [_of_experts(target, adapters, options, expert_rank) for target in parameters]
    if share_inputs:
        if adapters is not None:
            raise ValueError(
                "share_inputs: layers with a stack of adapters compute on their own; got share_inputs=True"
            )
        _check_sharing(model, targets, dropout)

    blocks = {}
    if fuse_mlp:
        if adapters is not None:
            raise ValueError("fuse_mlp: layers with a stack of adapters compute on their own; got fuse_mlp=True")
        blocks = mlps_of(model, nn.Module, {target.module for target in targets})

    def make(_name: str, module: nn.Module) -> nn.Module:
        return AFALinear(module, **options) if adapters is None else AFALinearStack(module, adapters)

    replace(model, targets, trained, make)
    for target, own in zip(parameters, of_experts, strict=True):
        add_to_experts(model, target, own, stack=adapters is not None)
    if adapters is None and share_inputs is not False and not dropout:
        attach_shared_inputs(model, AFALinear)
    return attach_mlps(model, blocks)


def _each(adapters: Mapping[str, Mapping[str, Any]], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the checked options of each adapter in full."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(f"adapters: expected the options of each adapter by its name, got {adapters!r}")
    full = {}
    for name, own in adapters.items():
        check_name(name)
        unknown = own.keys() - options.keys()
        if unknown:
            raise TypeError(f"adapters: {name!r} has {min(unknown)}; expected some of {', '.join(options)}")
        full[name] = {**options, **own}
        try:
            BranchOptions(**full[name])
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapters: {name!r}: {error}") from None
    return full


def _of_experts(
    target: Target, adapters: Mapping[str, dict[str, Any]] | None, options: dict[str, Any], expert_rank: str
) -> dict[str, Any]:
    """Return the options of one branch of experts, or of each adapter by its name."""
    if adapters is not None:
        check_whole(target.experts)
        return {name: _of_experts(target, None, own, expert_rank) for name, own in adapters.items()}
    return {**options, "r": rank_of_expert(target.experts, options["r"], expert_rank)}


def _check_sharing(model: nn.Module, targets: list[Candidate], dropout: float) -> None:
    if dropout > 0.0:
        raise ValueError(
            "share_inputs: dropout draws one mask for each layer, so no product over x can be shared; got "
            f"dropout={dropout}"
        )
    children: dict[nn.Module, dict[str, int]] = {}
    for target in targets:
        in_features = weight_like(target.module).shape[1]
        children.setdefault(target.parent, {})[target.attribute] = in_features
    if not any(list(siblings_of(sizes)) for sizes in children.values()):
        raise ValueError(nothing_to_share(model))


def replace(
    model: nn.Module,
    targets: list[Candidate],
    trained: list[str],
    make: Callable[[str, nn.Module], nn.Module],
) -> None:
    """Freeze ``model`` but for ``trained``, and put ``make(name, module)`` at each target."""
    model.requires_grad_(False)
    for name in trained:
        module = model.get_submodule(name)
        module.requires_grad_(True)
        setattr(module, TRAINABLE_MARK, True)
    for target in targets:
        setattr(target.parent, target.attribute, make(target.name, target.module))
    _leave_fast_paths(model)
    _guard_save_pretrained(model)


def add_to_experts(model: nn.Module, target: Target, options: Mapping[str, Any], *, stack: bool) -> None:
    """Let a fused parameter of ``model`` have a branch with these options or, as a stack, adapters with options by
    their names."""
    where = target.experts, target.parameter
    layer = AFAExpertStack(*where, options) if stack else AFAExpertLinear(*where, **options)
    if not hasattr(target.experts, "afa"):
        AFAExperts().attach(target.experts)
        *block, experts, _ = ["", *target.name.split(".")]
        if stack and experts:  # no module that is a model itself
            check_names_of(model.get_submodule(".".join(block[1:])))
    target.experts.afa[target.parameter] = layer


def unload(model: nn.Module) -> nn.Module:
    """Take the AFA layers out of ``model`` and put their base layers back.

    After :func:`merge` the base layers hold the merged weights, so the model keeps what it learned;
    without it the branches are dropped, and the model is the one that was injected. Parameters stay
    frozen as they are.

    Raises:
        ValueError: the model has no AFA layer, only some of them are merged, or one is sharded for
            tensor parallelism. The model is unchanged then.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ADAPTED)]
    if not layers:
        raise nothing_found(model)
    if len({layer.merged for _, layer in layers}) > 1:
        name = next(name for name, layer in layers if not layer.merged)
        raise ValueError(f"model: some layers are merged and {name} is not; merge(model) or unmerge(model) first")
    sharded = next((name for name, layer in layers if getattr(layer, "_parallel", None) is not None), None)
    if sharded is not None:
        raise ValueError(
            f"model: {sharded} is sharded by a style of afa_kernels.parallel, which its base layer "
            "does not know; save_adapter(model) and load it into a whole model"
        )
    if isinstance(model, LAYERS):
        return model.base_layer
    unfuse_mlp(model)
    was_dequantized = any(getattr(layer, "_quantized", None) is not None for _, layer in layers)
    with told_together(named_mergeable(model), model):
        _take_out(model)
    forget_quantization(model, was_dequantized)
    return model


def _take_out(model: nn.Module) -> None:
    """Put the base layers back."""
    unshare_inputs(model)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, LAYERS):
                child.base_layer.train(child.training)
                setattr(parent, attribute, child.base_layer)
            elif isinstance(child, AFAExperts):
                child.detach(parent)
        check_no_names_of(parent)
        for attribute, value in parent.__dict__.pop(_FAST_PATH_MARK, {}).items():
            setattr(parent, attribute, value)
        parent.__dict__.pop(TRAINABLE_MARK, None)
    model.__dict__.pop("save_pretrained", None)


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
        if any(isinstance(m, LAYERS) for m in module.modules()):
            setattr(module, _FAST_PATH_MARK, {attribute: getattr(module, attribute, off)})
            setattr(module, attribute, off)


def _guard_save_pretrained(model: nn.Module) -> None:
    """Let a model of transformers refuse to write files that ``from_pretrained`` would read without the AFA layers."""
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained = MethodType(save_pretrained, model)


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """``model.save_pretrained`` while the model has AFA layers. Checkpoints of a Trainer are written, because the
    Trainer loads them into the same layers.

    Raises:
        ValueError: ``from_pretrained`` could not read what would be written.
    """
    of_trainer = re.fullmatch(r"checkpoint-\d+", Path(save_directory).name)
    if not of_trainer and any(isinstance(module, ADAPTED) for module in model.modules()):
        raise ValueError(
            "save_pretrained: the model has AFA layers, and from_pretrained would initialize their weights at random; "
            "afa_kernels.save_adapter(model, path) writes the adapter, and after afa_kernels.merge(model) and "
            "afa_kernels.unload(model) save_pretrained writes the whole model"
        )
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
