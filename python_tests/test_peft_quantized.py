"""Quantized base layers: the branch is the operator beside them. Each library is tested where it is
installed."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft_models import TARGETS, Net, assert_same, fill_adapters, gradients
from test_peft_adapter import PASSES_CONFIG, Branch, config

from afa_kernels import set_alpha_t
from afa_kernels.peft import AFALoraConfig, AFALoraLayer
from afa_kernels.peft.layer import install

WIDTHS = (64, 128, 64)  # bitsandbytes multiplies in blocks of 64 on a CPU


def bnb_4bit():
    bnb = pytest.importorskip("bitsandbytes")
    net = Net(widths=WIDTHS)
    for name in TARGETS:
        dense = getattr(net, name)
        layer = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=dense.bias is not None,
            compute_dtype=torch.float32, quant_type="nf4",
        )  # fmt: skip
        layer.load_state_dict(dense.state_dict())
        setattr(net, name, layer.to("cpu"))
    net.is_loaded_in_4bit = True
    return net


def bnb_8bit():
    bnb = pytest.importorskip("bitsandbytes")
    net = Net(widths=WIDTHS)
    for name in TARGETS:
        dense = getattr(net, name)
        layer = bnb.nn.Linear8bitLt(
            dense.in_features, dense.out_features, bias=dense.bias is not None,
            has_fp16_weights=False,
        )  # fmt: skip
        layer.load_state_dict(dense.state_dict())
        setattr(net, name, layer.to("cpu"))
    net.is_loaded_in_8bit = True
    return net


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    net = Net(widths=WIDTHS)
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig(), lambda m, name: name in TARGETS)
    return net


def hqq_4bit():
    core = pytest.importorskip("hqq.core.quantize")
    net = Net(widths=WIDTHS)
    for name in TARGETS:
        quantized = core.HQQLinear(
            getattr(net, name), core.BaseQuantizeConfig(nbits=4, group_size=8),
            compute_dtype=torch.float32, device="cpu", initialize=True,
        )  # fmt: skip
        setattr(net, name, quantized)
    return net


QUANTIZED = {
    "Linear4bit": bnb_4bit,
    "Linear8bitLt": bnb_8bit,
    "TorchaoLoraLinear": torchao_int8,
    "HqqLoraLinear": hqq_4bit,
}


@pytest.fixture(params=QUANTIZED)
def quantized(request):
    """A function that makes the same network at each call."""

    def make():
        torch.manual_seed(0)
        return QUANTIZED[request.param]()

    return make


@pytest.fixture
def model(quantized, request):
    made = fill_adapters(get_peft_model(quantized(), config()))
    assert type(made.q_proj).__name__ == f"AFALora{request.node.callspec.params['quantized']}"
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha_t", [0.0, 0.5])
def test_the_branch_beside_a_quantized_layer(model, alpha_t):
    set_alpha_t(model, alpha_t)
    x = torch.randn(2, 5, WIDTHS[0])
    layer = model.q_proj
    got = gradients(layer, x)
    wanted = gradients(Branch(layer, "silu"), x)
    assert_same(got, wanted)
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()  # bitsandbytes has another kernel for inputs that need a gradient
def test_a_mixed_batch(model):
    model.eval()
    x = torch.randn(2, 3, WIDTHS[0])
    y = model(x, adapter_names=["default", "__base__"])
    torch.testing.assert_close(y[:1], model(x)[:1])
    with model.disable_adapter():
        torch.testing.assert_close(y[1:], model(x)[1:])


@pytest.mark.filterwarnings("ignore")
def test_merging(model, quantized):
    with pytest.raises(ValueError, match="anneal to alpha_t = 0 first"):
        model.merge_adapter()
    if "Torchao" in type(model.q_proj).__name__:
        pytest.skip("PEFT requantizes torchao layers of models loaded through transformers only")
    stock = fill_adapters(get_peft_model(quantized(), config(LoraConfig)))
    set_alpha_t(model, 0.0)
    x = torch.randn(3, WIDTHS[0])
    model.merge_adapter()
    stock.merge_adapter()
    torch.testing.assert_close(model(x), stock(x))


@pytest.mark.skipif(not PASSES_CONFIG, reason="its constructor takes other arguments")
def test_gptq_layers_go_through_the_seam():
    """With a dense layer in the place of the quantized one, which needs a GPU library to make."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    base = nn.Linear(*WIDTHS[:2]).requires_grad_(False)
    layer = GPTQLoraLinear(base, "default", config=LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6)
    install(layer, "default", AFALoraConfig(r=4, lora_alpha=6, activation="gelu"))
    fill_adapters(layer)
    layer.set_alpha_t(0.5)
    assert isinstance(layer, AFALoraLayer)
    x = torch.randn(2, 5, WIDTHS[0])
    got, wanted = gradients(layer, x), gradients(Branch(layer, "gelu"), x)
    assert_same(got, wanted)
