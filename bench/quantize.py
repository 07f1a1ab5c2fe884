"""The frozen weights of a model in the formats of quantization libraries.

``python -m bench.quantize`` merges an adapter into a layer of each format, and prints how much of it the weight keeps.
"""

import warnings
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


_TORCHAO: dict[str, Callable] = {
    "torchao-int8": lambda q: q.Int8WeightOnlyConfig(),
    "torchao-float8": lambda q: q.Float8WeightOnlyConfig(),
    "torchao-int4": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
}


def _torchao(base: str) -> Callable[[nn.Module, Sequence[str]], None]:
    def apply(model: nn.Module, names: Sequence[str]) -> None:
        from torchao import quantization

        config = _TORCHAO[base](quantization)
        quantization.quantize_(model, config, lambda _, name: name.rpartition(".")[2] in names)

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
    **{base: _torchao(base) for base in _TORCHAO},
    "quanto-int8": _quanto_int8,
}


def kept(base: str, share: float, **options: object) -> float:
    """Return how much of an adapter, of ``share`` of the norm of its weight, is in the weight once it is merged; the
    layer is 1024 by 1024, the rank 16."""
    from peft import get_peft_model

    import afa_kernels
    from afa_kernels.peft import AFALoraConfig

    torch.manual_seed(0)
    net = nn.Sequential()
    net.layer = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    nn.init.normal_(net.layer.weight, std=0.02)  # as those of large models are distributed
    norm = net.layer.weight.float().norm()
    BASES[base](net, ["layer"])
    model = get_peft_model(net, AFALoraConfig(target_modules=["layer"], r=16))
    afa_kernels.set_alpha_t(model, 0.0)
    layer = model.base_model.model.layer
    if base in _TORCHAO:
        from torchao import quantization

        layer.get_apply_tensor_subclass = lambda: _TORCHAO[base](quantization)  # transformers says how, else
    b = layer.lora_B["default"].weight
    nn.init.normal_(b)
    with torch.no_grad():
        b *= share * norm / layer.get_delta_weight("default").norm()
    model.merge_adapter(**options)
    return afa_kernels.merge_report(model).total


def main() -> None:
    warnings.simplefilter("ignore")
    shares = (0.001, 0.01, 0.1)
    print(f"| weight | {' | '.join(f'{100 * share:g}%' for share in shares)} |\n|{' --- |' * 4}")
    cases = [(base, base, {}) for base in BASES if base != "quanto-int8"]  # which takes no sum
    cases += [(f"{base}, `dequantize=True`", base, {"dequantize": True}) for base in BASES if base != "dense"]
    for title, base, options in cases:
        print(f"| {title} | {' | '.join(f'{kept(base, share, **options):.2f}' for share in shares)} |")


if __name__ == "__main__":
    main()
