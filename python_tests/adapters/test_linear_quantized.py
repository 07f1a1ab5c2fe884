"""AFALinear and inject where layers are quantized."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from layer_helpers import composed
from peft import get_peft_model
from peft_models import TARGETS, assert_same, fill_adapters, gradients

import afa_kernels as afa
from adapters.quantized_models import QUANTIZED, WIDTHS, dense, library, made, weights
from adapters.test_peft_adapter import config


@pytest.fixture(params=QUANTIZED)
def kind(request):
    return request.param


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha_t", [0.0, 0.5])
def test_inject_puts_a_branch_beside_a_quantized_tensor(kind, alpha_t):
    net = made(kind)
    x = torch.randn(2, 5, WIDTHS[0])
    afa.inject(net, list(TARGETS), r=4)
    with torch.no_grad():
        for name in TARGETS:
            getattr(net, name).lora_b.normal_(std=0.3)
    afa.set_alpha_t(net, alpha_t)
    layer = net.q_proj
    assert_same(gradients(layer, x), gradients(Composed(layer), x))
    net(x).sum().backward()
    afa.set_alpha_t(net, 0.0)
    before, unmerged = weights(net), net(x)
    for action in (lambda: afa.merge(net), layer.merge, layer.merged_weight):
        with pytest.raises(ValueError, match="merge: \\w+ has a quantized weight.*full precision"):
            action()
    assert torch.equal(net(x), unmerged) and not layer.merged
    assert all(torch.equal(w, before[name]) for name, w in weights(net).items())


class Composed(nn.Module):
    """An AFALinear in plain torch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return composed(self.layer, x)


@pytest.mark.filterwarnings("ignore")
def test_a_stack_beside_a_quantized_tensor(kind):
    net = made(kind)
    afa.inject(net, list(TARGETS), adapters={"one": {"r": 4}})
    x = torch.randn(2, 5, WIDTHS[0])
    with afa.adapters_of(net, ["one", "one"]):
        net(x).sum().backward()
    assert net.q_proj.adapters["one"].lora_b.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore")
def test_inject_adapts_quantized_layers(kind, tmp_path):
    """And what it saved is loaded into another model."""
    net, other, x = made(kind), made(kind), torch.randn(40, WIDTHS[0])
    afa.inject(net, "all-linear", r=4)
    assert all(isinstance(getattr(net, name), afa.AFALinear) for name in (*TARGETS, "head"))
    assert net.q_proj.lora_a.shape == (4, WIDTHS[0]) and net.q_proj.lora_a.dtype == torch.float32
    fill_adapters(net)
    afa.save_adapter(net, tmp_path)
    afa.load_adapter(other, tmp_path)
    assert torch.equal(other(x), net(x))
    afa.unload(net)
    assert type(net.q_proj) is type(made(kind).q_proj)


def test_inject_refuses_to_leave_quantized_layers_out():
    """Layers of GPTQ and AWQ have no class in common, and their libraries need a GPU."""

    class QuantLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 32, 64
            self.register_buffer("qweight", torch.zeros(4, 64, dtype=torch.int32))

    net = nn.Sequential(QuantLinear(), nn.Linear(64, 8))
    with pytest.raises(ValueError, match="leave out 1 of 2 linear layers. 0: QuantLinear.*quantized.*AFALoraConfig"):
        afa.inject(net, "all-linear")
    with pytest.raises(TypeError, match="0 cannot be adapted: QuantLinear has a quantized weight.*AFALoraConfig"):
        afa.inject(net, ["0"])
    assert type(net[0]) is QuantLinear and type(net[1]) is nn.Linear
    afa.inject(net, "all-linear", exclude_modules=["0"])
    assert isinstance(net[1], afa.AFALinear)


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_gives_no_gradient_is_an_error():
    """torchao's weights with activations quantized as they come do not differentiate these."""
    quantization = library("torchao.quantization")
    if not hasattr(quantization, "Int8DynamicActivationIntxWeightConfig"):
        pytest.skip("this torchao has no such configuration")
    x = torch.randn(3, WIDTHS[0], requires_grad=True)
    nets = [dense() for _ in range(3)]
    for net in nets:
        quantization.quantize_(
            net, quantization.Int8DynamicActivationIntxWeightConfig(), lambda m, name: name == "q_proj"
        )
    if nets[0].q_proj(x).requires_grad:
        pytest.skip("this torchao differentiates it")
    afa.inject(nets[0], ["q_proj"])
    afa.inject(nets[1], ["q_proj"], adapters={"one": {}})
    with pytest.raises(RuntimeError, match="x: it needs a gradient, and the output of Linear"):
        nets[0].q_proj(x)
    with afa.adapters_of(nets[1], ["one"] * 3), pytest.raises(RuntimeError, match="x: it needs a gradient"):
        nets[1].q_proj(x)
    model = get_peft_model(nets[2], config(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="x: it needs a gradient"):
        model.q_proj(x)
    model.q_proj(x.detach()).sum().backward()
