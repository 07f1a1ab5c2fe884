"""merge, unmerge and merge_report: the branches of a model become part of its weights."""

import torch
from torch import nn

from afa_kernels.experts import AFAExpertLinear
from afa_kernels.layers.kept import MergeReport, report_of, told_together
from afa_kernels.layers.linear import AFALinear
from afa_kernels.layers.merging import check_dequantize
from afa_kernels.layers.quantized import dense_dtype
from afa_kernels.layers.stack import AdapterStack
from afa_kernels.model.adapted import named_layers, named_mergeable
from afa_kernels.model.targets import first_layer_of_peft


def merge(model: nn.Module, *, keep_original: bool = False, dequantize: bool | torch.dtype = False) -> nn.Module:
    """Merge every AFA layer of ``model``: it then costs what the frozen model costs.

    :func:`merge_report` says how much of each branch is in the weights afterwards.

    Args:
        keep_original: keep a copy of each weight for a bit-exact :func:`unmerge` (see
            :meth:`AFALinear.merge`).
        dequantize: put an ``nn.Linear`` with the dequantized weight and the sum into the place of each quantized base
            layer; a dtype: in that one. The quantized layers are kept until :func:`unload`, and :func:`unmerge` puts
            them back as they were.

    Raises:
        ValueError: a layer cannot be merged (``alpha_t`` is not 0, say, its weight is quantized and ``dequantize`` is
            not given, or it has a stack of adapters). No layer is changed then.
        RuntimeError: a weight did not take its sum. No layer is merged then; those before it are unmerged as
            :func:`unmerge` does it.

    Warns:
        UserWarning: layers keep less than 0.9 of their branch; once, with how many, which the lowest and the total.
    """
    check_dequantize(dequantize)
    layers = _layers(model)
    dense = {name: dequantize for name, _ in layers}
    if dequantize is True:
        bases = {name: layer.base_layer for name, layer in layers if isinstance(layer, AFALinear)}
        dense |= {name: dense_dtype(base, model) or True for name, base in bases.items()}
    for name, layer in layers:
        if not layer.merged:
            # Computed here to be checked and again to be written, so that no copy of the whole
            # model is held.
            _named(name, lambda name=name, layer=layer: layer.check_merge(dense[name]))
        elif keep_original:
            _named(name, lambda layer=layer: layer.merge(keep_original=True))
    done = []
    with told_together(layers, model):
        try:
            for name, layer in layers:
                if not layer.merged:
                    _named(name, lambda name=name, layer=layer: layer.merge_checked(keep_original, dense[name]))
                    done.append(layer)
        except Exception:
            for layer in done:
                layer.unmerge()
            raise
    return model


def merge_report(model: nn.Module) -> MergeReport:
    """Return how much of ``scaling * B @ A`` is in the weights of a merged model, per layer and in total.

    Args:
        model: merged by :func:`merge` or by PEFT with layers of this package (``merge_adapter``), or what
            :func:`unload` or PEFT's ``merge_and_unload`` or ``unload`` returned then, as long as it lives.

    Raises:
        ValueError: nothing in ``model`` is merged.
    """
    report = report_of(model, named_mergeable(model))
    if report is None:
        raise ValueError(f"model: expected one that is merged, got {type(model).__name__} with nothing merged")
    return report


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`: bit for bit if it kept the originals, by subtraction otherwise."""
    for _, layer in _layers(model):
        layer.unmerge()
    return model


def _layers(model: nn.Module) -> list[tuple[str, AFALinear | AFAExpertLinear]]:
    layers = list(named_layers(model))
    if not layers:
        raise nothing_found(model)
    return layers


def nothing_found(model: nn.Module) -> ValueError:
    if first_layer_of_peft(model) is not None:
        return ValueError(
            f"model: expected AFA layers, found those of PEFT in {type(model).__name__}; use its own methods "
            "(merge_adapter(), unmerge_adapter(), merge_and_unload(), unload())"
        )
    if any(isinstance(module, AdapterStack) for module in model.modules()):
        return ValueError(
            "model: its layers have a stack of adapters, and no weight equals several branches; save_adapter(model, "
            "path, adapter) and load that into a model of its own"
        )
    return ValueError(f"model: expected AFA layers, found none in {type(model).__name__}; inject(model) adds them")


def _named(name: str, action) -> None:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        if type(error) not in (ValueError, RuntimeError):  # torch's, such as one of memory, keep their kind
            raise
        raise type(error)(f"{name}: {error}") from None
