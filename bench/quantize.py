"""The frozen weights of a model in the formats of quantization libraries."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn


def _linears(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield (parent, attribute, layer) of the linear layers with one of these names."""
    for name, module in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if attribute in names:
            yield model.get_submodule(parent), attribute, module


def _nf4(model: nn.Module, names: Sequence[str]) -> None:
    import bitsandbytes

    for parent, attribute, dense in _linears(model, names):
        layer = bitsandbytes.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=dense.weight.dtype, quant_type="nf4"
        )
        layer.weight = bitsandbytes.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
        setattr(parent, attribute, layer.to("cpu"))
    model.is_loaded_in_4bit = True


def _bnb_int8(model: nn.Module, names: Sequence[str]) -> None:
    import bitsandbytes

    for parent, attribute, dense in _linears(model, names):
        sizes = dense.in_features, dense.out_features
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        layer.load_state_dict(dense.state_dict())
        setattr(parent, attribute, layer.to("cpu").requires_grad_(False))
    model.is_loaded_in_8bit = True


def _hqq(model: nn.Module, names: Sequence[str]) -> None:
    from hqq.core import quantize

    for parent, attribute, dense in _linears(model, names):
        config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
        options = {"compute_dtype": dense.weight.dtype, "device": "cpu", "initialize": True}
        setattr(parent, attribute, quantize.HQQLinear(dense, config, **options))


def _torchao(config: Callable) -> Callable[[nn.Module, Sequence[str]], None]:
    def apply(model: nn.Module, names: Sequence[str]) -> None:
        from torchao import quantization

        quantization.quantize_(model, config(quantization), lambda _, name: name.rpartition(".")[2] in names)

    return apply


def _quanto_int8(model: nn.Module, names: Sequence[str]) -> None:
    from optimum import quanto

    if names:
        quanto.quantize(model, weights=quanto.qint8, include=[f"*{name}" for name in names])
        quanto.freeze(model)


BASES: dict[str, Callable[[nn.Module, Sequence[str]], None]] = {
    "dense": lambda model, names: None,
    "nf4": _nf4,
    "bnb-int8": _bnb_int8,
    "hqq": _hqq,
    "torchao-int8": _torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao-float8": _torchao(lambda q: q.Float8WeightOnlyConfig()),
    "torchao-int4": _torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))),
    "quanto-int8": _quanto_int8,
}
