"""Networks with layers of quantization libraries, each skipped where its library is missing."""

from functools import partial

import pytest
import torch
from peft_models import TARGETS, Net

WIDTHS = (64, 128, 64)  # bitsandbytes multiplies in blocks of 64 on a CPU


def library(name):
    # ImportError: it may be installed and not fit the torch that is.
    return pytest.importorskip(name, exc_type=ImportError)


def replaced(net, make, names, **marks):
    """``net`` with ``make(layer)`` for each of these layers, marked as transformers does it."""
    for name in names:
        setattr(net, name, make(getattr(net, name)))
    for name, value in marks.items():
        setattr(net, name, value)
    return net


def bnb_4bit(net, compress_statistics=True, names=TARGETS, quant_type="nf4"):
    bnb = library("bitsandbytes")

    def make(dense):
        layer = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=dense.bias is not None, compute_dtype=torch.float32,
            quant_type=quant_type, compress_statistics=compress_statistics,
        )  # fmt: skip
        layer.load_state_dict(dense.state_dict())
        return layer.to("cpu").requires_grad_(False)

    return replaced(net, make, names, is_loaded_in_4bit=True)


def bnb_8bit(net, names=TARGETS):
    bnb = library("bitsandbytes")

    def make(dense):
        options = {"bias": dense.bias is not None, "has_fp16_weights": False}
        layer = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, **options)
        layer.load_state_dict(dense.state_dict())
        return layer.to("cpu").requires_grad_(False)

    return replaced(net, make, names, is_loaded_in_8bit=True)


def torchao_int8(net, names=TARGETS):
    return torchao(net, lambda quantization: quantization.Int8WeightOnlyConfig(), names)


def torchao_int4(net, names=TARGETS):
    def config(q):
        return q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))

    return torchao(net, config, names)


def torchao(net, config, names=TARGETS):
    quantization = library("torchao.quantization")
    quantization.quantize_(net, config(quantization), lambda m, name: name in names)
    return net


def hqq_4bit(net, names=TARGETS):
    core = library("hqq.core.quantize")

    def make(dense):
        config = core.BaseQuantizeConfig(nbits=4, group_size=8)
        return core.HQQLinear(dense, config, compute_dtype=torch.float32, device="cpu", initialize=True)

    return replaced(net, make, names)


def quanto_int8(net, names=TARGETS, weights="qint8"):
    quanto = library("optimum.quanto")
    quanto.quantize(net, weights=getattr(quanto, weights), include=list(names))
    quanto.freeze(net)
    return net


# PEFT's layer for each: to PEFT a layer of quanto is a dense one.
QUANTIZED = {
    "bnb-4bit": "Linear4bit",
    "bnb-8bit": "Linear8bitLt",
    "torchao": "TorchaoLoraLinear",
    "hqq": "HqqLoraLinear",
    "quanto": "Linear",
}
# On the path of dense layers, of which one class each would do for other tests; and the others.
DEQUANTIZED = {
    "bnb-4bit": bnb_4bit,
    "bnb-fp4": partial(bnb_4bit, compress_statistics=False, quant_type="fp4"),
    "hqq": hqq_4bit,
    "quanto": quanto_int8,
    "torchao-int4": torchao_int4,
}
OWN = {
    "bnb-8bit": bnb_8bit,
    "torchao": torchao_int8,
    "torchao-float8": partial(torchao, config=lambda q: q.Float8WeightOnlyConfig()),
    "quanto-int4": partial(quanto_int8, weights="qint4"),
}
REQUANTIZED = ("bnb-4bit", "bnb-8bit", "hqq")  # by PEFT's merge


def dense():
    """The same network at each call."""
    torch.manual_seed(0)
    return Net(widths=WIDTHS).requires_grad_(False)


def made(kind, net=None, **options):
    make = (DEQUANTIZED | OWN)[kind]
    return make(dense() if net is None else net, **options)


def weights(model):
    """What the target layers compute with, in floating point, by their outputs for the identity."""
    found = {}
    for name in TARGETS:
        layer = getattr(model, name)
        layer = getattr(layer, "base_layer", layer)
        # With a gradient, so that bitsandbytes does not repack a 4-bit weight; copied, as it may be computed with.
        x = torch.eye(WIDTHS[TARGETS.index(name)]).requires_grad_()
        bias = 0 if layer.bias is None else layer.bias
        found[name] = (layer(x) - bias).detach().T.clone()
    return found
