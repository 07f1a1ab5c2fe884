"""Quantized base layers: the branch is the operator beside them. Each library is tested where it is
installed."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft_models import TARGETS, assert_same, fill_adapters, gradients

from adapters.quantized_models import QUANTIZED, REQUANTIZED, WIDTHS, bnb_4bit, dense, library, made, weights
from adapters.test_peft_adapter import PASSES_CONFIG, Branch, config
from afa_kernels import set_alpha_t
from afa_kernels.peft import AFALoraConfig, AFALoraLayer
from afa_kernels.peft.layer import AFALoraVariant, install, stock_class


def adapted(kind, cls=AFALoraConfig):
    return fill_adapters(get_peft_model(made(kind), config(cls)))


@pytest.fixture(params=QUANTIZED)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    model = adapted(kind)
    assert type(model.q_proj).__name__ == f"AFALora{QUANTIZED[kind]}"
    return model


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


def assert_holds_the_sum(kind, model, before):
    """A merged model is no further from the sums than a dense model with these, quantized."""
    net = dense()
    sums = {name: before[name] + getattr(model, name).get_delta_weight("default").detach() for name in TARGETS}
    for name in TARGETS:
        getattr(net, name).weight.copy_(sums[name])
    quantized = weights(made(kind, net))
    for name, merged in weights(model).items():
        error, least = torch.dist(merged, sums[name]), torch.dist(quantized[name], sums[name])
        assert error <= 2 * least + torch.finfo(torch.float32).eps * sums[name].norm()
        assert error < torch.dist(before[name], sums[name])


@pytest.mark.filterwarnings("ignore")
def test_merging(model, kind):
    with pytest.raises(ValueError, match="anneal to alpha_t = 0 first"):
        model.merge_adapter()
    set_alpha_t(model, 0.0)
    x = torch.randn(3, WIDTHS[0])
    before = weights(model)
    if kind in REQUANTIZED:
        stock = adapted(kind, LoraConfig)
        model.merge_adapter()
        stock.merge_adapter()
        torch.testing.assert_close(model(x), stock(x))
        assert_holds_the_sum(kind, model, before)
        return
    unmerged = model(x)
    # torchao's are quantized anew where transformers loaded the model and says how.
    with pytest.raises(ValueError, match="get_apply_tensor_subclass" if kind == "torchao" else "merge: QLinear has a"):
        model.merge_adapter()
    assert not model.q_proj.merged and torch.equal(model(x), unmerged)
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in TARGETS)
    with pytest.raises(ValueError, match="get_apply_tensor_subclass|full precision"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.filterwarnings("ignore")
def test_a_torchao_layer_is_merged_where_it_says_how():
    quantization = library("torchao.quantization")
    model = adapted("torchao")
    set_alpha_t(model, 0.0)
    before = weights(model)
    for name in TARGETS:
        getattr(model, name).get_apply_tensor_subclass = quantization.Int8WeightOnlyConfig
    model.merge_adapter()
    assert_holds_the_sum("torchao", model, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REQUANTIZED)
@pytest.mark.parametrize("fault", ["nothing", "noise"])
def test_a_merge_that_does_not_write_the_sum_is_an_error(kind, fault, monkeypatch):
    """Where PEFT writes nothing, or something else."""
    model = adapted(kind)
    set_alpha_t(model, 0.0)
    layer, before, x = model.q_proj, weights(model), torch.randn(3, WIDTHS[0])
    unmerged = layer(x.requires_grad_())
    stock = stock_class(type(layer))
    merge = stock.merge

    def faulty(self, safe_merge=False, adapter_names=None):
        if fault == "nothing":
            self.merged_adapters.extend(adapter_names)
            return
        with monkeypatch.context() as patch:
            patch.setattr(AFALoraVariant, "merge_safe", lambda *_: torch.randn(WIDTHS[1], WIDTHS[0]))
            merge(self, safe_merge, adapter_names)

    monkeypatch.setattr(stock, "merge", faulty)
    with pytest.raises(RuntimeError, match="away from the sum that it should hold"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(weights(model)["q_proj"], before["q_proj"]) and torch.equal(layer(x), unmerged)
    monkeypatch.undo()
    layer.merge()
    assert layer.merged and not torch.equal(weights(model)["q_proj"], before["q_proj"])


# --- bitsandbytes on a CPU with AVX512-BF16 ----------------------------------------------------------


def repacked(kind):
    """A model whose 4-bit weights were repacked, as one evaluation does it on such a CPU; elsewhere marked so."""
    if kind == "marked":
        model = adapted("bnb-4bit")
        for name in TARGETS:
            getattr(model, name).base_layer.weight.quant_state.packing_format_for_cpu = True
        return model
    functional = library("bitsandbytes.functional")
    if not getattr(functional, "has_avx512bf16", bool)():
        pytest.skip("bitsandbytes repacks weights on a CPU with AVX512-BF16 only")
    model = adapted("bnb-4bit").eval()
    with torch.no_grad():
        model(torch.randn(3, WIDTHS[0]))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["marked", "evaluated"])
def test_a_repacked_layer_is_not_trained_through_nor_merged(kind):
    model = repacked(kind).train()
    x = torch.randn(2, 3, WIDTHS[0], requires_grad=True)
    set_alpha_t(model, 0.5)
    for names in ({}, {"adapter_names": ["default", "__base__"]}):
        with pytest.raises(RuntimeError, match="x: it needs a gradient.*support_avx512bf16_for_cpu = False"):
            model.q_proj(x, **names)
    set_alpha_t(model, 0.0)
    before = [getattr(model, name).base_layer.weight.clone() for name in TARGETS]
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="merge: bitsandbytes repacked.*Load the model again"):
            action()
    layer = model.q_proj
    layer.merged_adapters.append("default")
    with pytest.raises(ValueError, match="unmerge: bitsandbytes repacked"):
        layer.unmerge()
    layer.merged_adapters.clear()
    assert all(torch.equal(getattr(model, name).base_layer.weight, w) for name, w in zip(TARGETS, before, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_layer_that_may_not_be_repacked_is_trained_and_merged(compress_statistics):
    """The way out that the error names."""
    model = fill_adapters(get_peft_model(bnb_4bit(dense(), compress_statistics), config()))
    for name in TARGETS:
        getattr(model, name).base_layer.support_avx512bf16_for_cpu = False
    before = weights(model)
    model.eval()
    with torch.no_grad():
        model(torch.randn(3, WIDTHS[0]))
    model.train()
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in TARGETS)
    layer, x = model.q_proj, torch.randn(2, 5, WIDTHS[0])
    assert_same(gradients(layer, x), gradients(Branch(layer, "silu"), x))
    set_alpha_t(model, 0.0)
    model.merge_adapter()


# --- GPTQ --------------------------------------------------------------------------------------------


def gptq_layer(activation="gelu"):
    """PEFT's layer with a dense one in the place of the quantized one, which needs a GPU library to make."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    base = nn.Linear(*WIDTHS[:2]).requires_grad_(False)
    layer = GPTQLoraLinear(base, "default", config=LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6)
    install(layer, "default", AFALoraConfig(r=4, lora_alpha=6, activation=activation))
    return fill_adapters(layer)


@pytest.mark.skipif(not PASSES_CONFIG, reason="its constructor takes other arguments")
def test_gptq_layers_go_through_the_seam():
    layer = gptq_layer()
    layer.set_alpha_t(0.5)
    assert isinstance(layer, AFALoraLayer)
    x = torch.randn(2, 5, WIDTHS[0])
    got, wanted = gradients(layer, x), gradients(Branch(layer, "gelu"), x)
    assert_same(got, wanted)


@pytest.mark.skipif(not PASSES_CONFIG, reason="its constructor takes other arguments")
def test_gptq_layers_are_not_merged():
    layer = gptq_layer()
    layer.set_alpha_t(0.0)
    with pytest.raises(ValueError, match="merge: GPTQ.*full precision"):
        layer.merge()
