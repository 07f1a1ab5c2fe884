"""Quantized layers on the path of dense ones: what is computed, what is held in memory, and when the layer computes by
itself."""

import copy
import weakref

import pytest
import torch
from torch import nn

from bench import memory

pytest.importorskip("peft")

from helpers import relative_error
from peft import get_peft_model
from peft_models import TARGETS, fill_adapters

import afa_kernels as afa
from adapters.comparing import assert_accurate, results
from adapters.quantized_models import DEQUANTIZED, OWN, WIDTHS, dense, library, made, weights
from adapters.test_peft_adapter import config
from afa_kernels.layers import quantized
from afa_kernels.operator.quantized_weight import QuantizedWeight
from afa_kernels.peft import AFALoraConfig

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(params=DEQUANTIZED)
def kind(request):
    return request.param


@pytest.fixture
def made_dense(monkeypatch):
    """A list of the weights that were made for products; each is gone when the next one is made."""
    weights, alive, original = [], [], QuantizedWeight.dense

    def counted(self, dtype):
        assert all(weight() is None for weight in alive)
        weights.append((tuple(self.shape), dtype))
        weight = original(self, dtype)
        alive[:] = [weakref.ref(weight)]
        return weight

    monkeypatch.setattr(QuantizedWeight, "dense", counted)
    return weights


class Plain(nn.Module):
    """The formula of one layer with a weight in floating point."""

    def __init__(self, weight, bias, a, b, scaling, alpha_t):
        super().__init__()
        self.lora_a, self.lora_b = (nn.Parameter(t.detach().clone()) for t in (a, b))
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", bias.detach().clone() if bias is not None else None)
        self.scaling, self.alpha_t = scaling, alpha_t

    def forward(self, x):
        z = x @ self.lora_a.T.to(x.dtype)
        h = (1 - self.alpha_t) * z + self.alpha_t * nn.functional.silu(z)
        return nn.functional.linear(x, self.weight, self.bias) + self.scaling * (h @ self.lora_b.T.to(x.dtype))


def by_inject(net):
    afa.inject(net, list(TARGETS), r=4)
    fill_adapters(net)
    return net.q_proj, [net.q_proj.lora_a, net.q_proj.lora_b], net.q_proj.scaling


def by_peft(net):
    model = fill_adapters(get_peft_model(net, AFALoraConfig(r=4, target_modules=list(TARGETS))))
    return _of_peft(model)


def by_accelerate(net):
    model = fill_adapters(get_peft_model(net, config(r=4, lora_alpha=8, target_modules=list(TARGETS))))
    return _of_peft(afa.peft.accelerate(model))


def _of_peft(model):
    layer = model.base_model.model.q_proj
    return layer, [layer.lora_A["default"].weight, layer.lora_B["default"].weight], layer.scaling["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("adapt", [by_inject, by_peft, by_accelerate])
def test_results_are_those_of_the_dequantized_weight(kind, adapt, dtype, made_dense):
    net = made(kind)
    weight = weights(net)["q_proj"].float()
    layer, trained, scaling = adapt(net)
    plain = Plain(weight, layer.base_layer.bias, *trained, scaling, layer.alpha_t)
    x, dy = torch.randn(3, 13, WIDTHS[0], dtype=dtype), torch.randn(3, 13, WIDTHS[1], dtype=dtype)
    made_dense.clear()
    got = results(layer, trained, x, dy)
    assert made_dense == [((WIDTHS[1], WIDTHS[0]), dtype)] * 2  # the forward, and the backward again
    same, truth = (
        results(p, [p.lora_a, p.lora_b], x.to(t), dy.to(t))
        for t in (dtype, torch.float64)
        for p in [copy.deepcopy(plain).to(t)]
    )
    assert_accurate(got, same, truth, dtype)


def test_the_weight_is_not_made_for_a_gradient_that_nobody_needs(kind, made_dense):
    layer, trained, _ = by_inject(made(kind))
    made_dense.clear()
    layer(torch.randn(40, WIDTHS[0])).sum().backward()
    assert len(made_dense) == 1 and all(p.grad is not None for p in trained)


def test_a_second_derivative_sees_the_weight(kind):
    layer, trained, _ = by_inject(made(kind))
    plain = Plain(weights_of(layer), layer.base_layer.bias, *trained, layer.scaling, layer.alpha_t)
    x = torch.randn(5, WIDTHS[0])

    def second(compute):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(compute(leaf).pow(2).sum(), leaf, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), leaf)[0]

    assert relative_error(second(layer), second(plain)) < 1e-5


def weights_of(layer):
    (weight,) = [quantized.frozen_weight(layer.base_layer, torch.zeros(1, WIDTHS[0]))]
    return weight.dense(torch.float32)


BLOCK = ("q_proj", "k_proj", "v_proj", "up_proj")


class Block(nn.Module):
    """Three layers that share their input, and one."""

    def __init__(self, size):
        super().__init__()
        for name in BLOCK:
            setattr(self, name, nn.Linear(size, size, bias=False).requires_grad_(False))

    def forward(self, x):
        return self.up_proj(torch.tanh(self.q_proj(x) + self.k_proj(x) + self.v_proj(x)))


@pytest.mark.parametrize("share_inputs", [True, False], ids=["shared", "apart"])
def test_one_dequantized_weight_at_a_time(kind, share_inputs, made_dense):
    """Of layers that share their input, too. By torch's allocator, whose profiler makes them compute apart, a pass
    holds no more than that over dense layers and what a library holds while it makes one weight."""
    size, x = 512, torch.randn(32, 512, requires_grad=True)
    one = size * size * 4
    peaks = []
    for net in (Block(size), made(kind, Block(size), names=BLOCK)):
        layer = net.q_proj
        afa.inject(net, list(BLOCK), r=4, share_inputs=share_inputs)
        net(x).sum().backward()  # what happens once
        peaks.append(memory.allocations(lambda net=net: net(x).sum().backward())[0])
    assert len(made_dense) == 2 * 2 * len(BLOCK)
    making = memory.allocations(quantized.kind_of(layer).maker(layer))[0]
    assert peaks[1] - peaks[0] <= max(making, one) + one // 8, [p / one for p in (*peaks, making)]


def test_nothing_of_its_size_is_saved(kind):
    size = 256
    net = made(kind, Block(size), names=BLOCK)
    afa.inject(net, list(BLOCK), r=4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        net(torch.randn(33, size, requires_grad=True)).sum()
    assert saved and max(saved) < size * size


def test_recomputed_in_activation_checkpointing(kind):
    net = made(kind)
    afa.inject(net, list(TARGETS), r=4)
    fill_adapters(net)
    x = torch.randn(40, WIDTHS[0], requires_grad=True)
    want = torch.autograd.grad(net(x).sum(), (x, net.q_proj.lora_a))
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)
        y.sum().backward()
        assert torch.equal(x.grad, want[0]) and torch.equal(net.q_proj.lora_a.grad, want[1])
        x.grad = net.q_proj.lora_a.grad = None


def test_operators_that_are_watched_see_a_weight(kind):
    """A mode sees the operators of the package, which take tensors."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    for share_inputs in (True, False):
        net, seen = made(kind, Block(64), names=BLOCK), []
        afa.inject(net, list(BLOCK), r=4, share_inputs=share_inputs)
        fill_adapters(net)
        x = torch.randn(40, 64, requires_grad=True)
        (want,) = torch.autograd.grad(net(x).sum(), x)
        with Watch():
            (dx,) = torch.autograd.grad(net(x).sum(), x)
        torch.testing.assert_close(dx, want)
        assert "afa_kernels::linear_backward" in seen


# --- when the layer computes by itself


def way(layer, x=None):
    return layer.plan(torch.randn(40, WIDTHS[0]) if x is None else x).frozen


def test_few_rows_without_a_gradient(kind, made_dense):
    layer, _, _ = by_inject(made(kind))
    x = torch.randn(31, WIDTHS[0])
    assert way(layer, x) == "dequantized: the product accumulates in place"
    with torch.no_grad():
        assert way(layer, x) == "the layer's own: fewer than 32 rows and no gradient"
        made_dense.clear()
        own = layer(x)
        assert made_dense == []
        torch.testing.assert_close(layer(torch.cat((x, x)))[:31], own, rtol=1e-4, atol=1e-4)
        assert len(made_dense) == 1


def test_hooks_and_other_forwards(kind, made_dense):
    layer, _, _ = by_inject(made(kind))
    made_dense.clear()
    handle = layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    x = torch.randn(40, WIDTHS[0])
    assert way(layer, x) == "the layer's own: it has hooks or a forward of its own"
    hooked = layer(x)
    assert made_dense == []
    handle.remove()
    torch.testing.assert_close(layer(x) + 1, hooked, rtol=1e-4, atol=1e-4)


def test_a_graph_that_is_compiled(kind, made_dense):
    layer, trained, _ = by_inject(made(kind))
    x = torch.randn(40, WIDTHS[0])
    want = results(layer, trained, x, torch.ones(40, WIDTHS[1]))
    torch._dynamo.reset()
    try:
        torch.compile(layer.base_layer, backend="aot_eager")(x.clone().requires_grad_()).sum().backward()
    except Exception as error:
        pytest.skip(f"this torch does not compile the layer itself: {error}")
    made_dense.clear()
    got = results(torch.compile(layer, backend="aot_eager"), trained, x, torch.ones(40, WIDTHS[1]))
    assert made_dense == []
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", OWN)
def test_libraries_whose_own_product_is_faster(own, made_dense):
    layer, trained, _ = by_inject(made(own))
    made_dense.clear()
    assert way(layer) == f"the layer's own: {quantized.kind_of(layer.base_layer).own}"
    if own == "quanto-int4":
        return  # its product compiles C++ when it is called first
    layer(torch.randn(40, WIDTHS[0])).sum().backward()
    assert trained[0].grad is not None and made_dense == []


def test_a_weight_that_is_not_quantized_yet():
    bnb = library("bitsandbytes")
    for base in (
        bnb.nn.Linear4bit(64, 64, quant_type="nf4"),
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True),
        library("optimum.quanto").QLinear(64, 64, weights=library("optimum.quanto").qint8),
    ):
        x = torch.randn(40, 64)
        assert quantized.kind_of(base) is None and quantized.frozen_weight(base, x) is None


def test_a_weight_that_fsdp_has_put_in_its_place():
    """FSDP shows a layer of bitsandbytes a view of its own, without the state that only the layer then has."""
    layer, trained, _ = by_inject(made("bnb-4bit"))
    x = torch.randn(40, WIDTHS[0])
    want = layer(x)
    base = layer.base_layer
    base.quant_state, weight = base.weight.quant_state, base._parameters.pop("weight")
    base.weight = weight.data.view_as(weight.data)
    assert quantized.kind_of(base) is None and quantized.frozen_weight(base, x) is None
    torch.testing.assert_close(layer(x.requires_grad_()), want, rtol=1e-4, atol=1e-4)


def test_activations_that_are_quantized_too():
    quanto = library("optimum.quanto")
    net = dense()
    quanto.quantize(net, weights=quanto.qint8, activations=quanto.qint8, include=list(TARGETS))
    quanto.freeze(net)
    assert quantized.frozen_weight(net.q_proj, torch.randn(40, WIDTHS[0])) is None


@pytest.mark.parametrize("block", [(128, 128), (48, 32), None], ids=str)
def test_block_fp8_of_transformers(block):
    """It computes on GPUs alone; dequantized, it does anywhere."""
    fp8 = library("transformers.integrations.finegrained_fp8")
    n, k = 200, 136
    base = fp8.FP8Linear(k, n, block_size=block, has_bias=True)
    dense = torch.randn(n, k)
    scales = torch.tensor(0.5) if block is None else torch.rand(-(-n // block[0]), -(-k // block[1])) + 0.5
    spread = (
        scales.expand(n, k)
        if block is None
        else scales.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
    )
    with torch.no_grad():
        base.weight.copy_(dense.to(base.weight.dtype))
        base.weight_scale_inv.copy_(scales)
        base.bias.normal_()
    weight = (base.weight.float() * spread).detach()
    layer = afa.AFALinear(base, r=4)
    fill_adapters(layer)
    plain = Plain(weight, base.bias, layer.lora_a, layer.lora_b, layer.scaling, 1.0)
    x, dy = torch.randn(9, k), torch.randn(9, n)
    got = results(layer, [layer.lora_a, layer.lora_b], x, dy)
    same = results(plain, [plain.lora_a, plain.lora_b], x, dy)
    plain = plain.double()
    assert_accurate(got, same, results(plain, [plain.lora_a, plain.lora_b], x.double(), dy.double()), x.dtype)
