"""What a merge says of the part of the adapter that the weights round away, and merging into dense layers."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft_models import TARGETS, fill_adapters

import afa_kernels as afa
from adapters.quantized_models import QUANTIZED, WIDTHS, dense, library, made, torchao
from adapters.test_peft_adapter import config
from afa_kernels.callbacks.annealer import Annealer
from afa_kernels.peft import AFALoraConfig, accelerate

LOSSY = "merged layers keep less than 0.9"
REQUANTIZED = ("bnb-4bit", "bnb-8bit", "hqq", "torchao-int8", "torchao-float8", "torchao-int4")


def torchao_config(kind):
    name = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig", "int4": "IntxWeightOnlyConfig"}[
        kind[8:]
    ]
    options = {"weight_dtype": torch.int4} if kind.endswith("int4") else {}
    return getattr(library("torchao.quantization"), name)(**options)


def network(kind, dtype=torch.float32):
    if kind == "dense":
        return dense().to(dtype)
    return torchao(dense(), lambda _: torchao_config(kind)) if kind.startswith("torchao-") else made(kind)


def weight_of(base):
    """The weight of a layer in float64, as its library dequantizes it."""
    kind, weight = type(base).__name__, getattr(base, "weight", None)
    if kind == "HQQLinear":
        weight = base.dequantize()
    elif kind == "Linear4bit":
        weight = library("bitsandbytes.functional").dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "Linear8bitLt":
        scales = weight.SCB if base.state.SCB is None else base.state.SCB
        weight = library("bitsandbytes.functional").int8_vectorwise_dequant(weight.data, scales)
    elif type(weight) is not nn.Parameter:
        weight = weight.dequantize()
    return weight.detach().double()


def layers(model):
    return {name: getattr(model, name) for name in TARGETS}


def weights(model):
    return {name: weight_of(getattr(layer, "base_layer", layer)) for name, layer in layers(model).items()}


def peft_model(kind, share, dtype=torch.float32, adapters=("default",), cls=AFALoraConfig):
    """A model of PEFT at identity, whose every adapter is ``share`` of the norm of its weight."""
    model = get_peft_model(network(kind, dtype), config(cls))
    for name in adapters[1:]:
        model.add_adapter(name, config(cls))
    model.base_model.set_adapter(list(adapters))
    fill_adapters(model)
    if cls is LoraConfig:
        accelerate(model)
    afa.set_alpha_t(model, 0.0)
    for layer in layers(model).values():
        if kind.startswith("torchao-"):
            layer.get_apply_tensor_subclass = lambda: torchao_config(kind)
        if type(layer.base_layer).__name__ == "Linear4bit":
            layer.base_layer.support_avx512bf16_for_cpu = False
        for name in adapters:
            norm = sum_of(layer, [name]).norm()
            layer.lora_B[name].weight.data *= share * weight_of(layer.base_layer).norm() / norm
    return model


def sum_of(layer, adapters=("default",)):
    """s·B·A of a layer of PEFT in float64."""
    each = ((layer.lora_A[a].weight, layer.lora_B[a].weight, layer.scaling[a]) for a in adapters)
    return sum(s * b.detach().double() @ a.detach().double() for a, b, s in each)


def injected(kind, share, dtype=torch.float32):
    net = afa.inject(network(kind, dtype), list(TARGETS), r=4)
    afa.set_alpha_t(net, 0.0)
    for layer in layers(net).values():
        layer.lora_b.data.normal_()
        norm = (layer.scaling * layer.lora_b.double() @ layer.lora_a.double()).norm()
        layer.lora_b.data *= share * weight_of(layer.base_layer).norm() / norm
    return net


def wanted_of(model):
    if hasattr(model, "peft_config"):
        return {name: sum_of(layer, layer.active_adapters) for name, layer in layers(model).items()}
    each = layers(model).items()
    return {name: layer.scaling * layer.lora_b.detach().double() @ layer.lora_a.double() for name, layer in each}


def merged(action):
    """What ``action`` returns, and the warnings that say what was lost."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(w.message) for w in caught if "keep less than" in str(w.message)]


def assert_reported(report, warned, before, after, wanted):
    products = {n: (((after[n] - before[n]) * wanted[n]).sum().item(), wanted[n].square().sum().item()) for n in wanted}
    fractions = {name: got / whole for name, (got, whole) in products.items()}
    total = sum(got for got, _ in products.values()) / sum(whole for _, whole in products.values())
    assert report.layers == pytest.approx(fractions, rel=1e-3, abs=1e-4) and fractions.keys() == report.layers.keys()
    assert report.total == pytest.approx(total, rel=1e-3, abs=1e-4)
    assert all(text in str(report) for text in (f"{report.total:.3f}", *fractions))
    low = [name for name in fractions if fractions[name] < 0.9]
    assert len(warned) == bool(low), (warned, fractions)
    if low:
        lowest = min(low, key=fractions.get)
        numbers = f"{lowest} keeps {report.layers[lowest]:.2f}, all layers together {report.total:.2f}"
        assert f"{len(low)} of {len(wanted)} {LOSSY}" in warned[0] and numbers in warned[0]
        assert "dequantize=True" in warned[0]
    return total


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", REQUANTIZED)
def test_a_merge_into_quantized_weights_says_what_they_keep(kind, share):
    model = peft_model(kind, share)
    before, wanted = weights(model), wanted_of(model)
    plain, warned = merged(copy.deepcopy(model).merge_and_unload)
    total = assert_reported(afa.merge_report(plain), warned, before, weights(plain), wanted)
    assert total > 0.9 if share == 0.5 else total < 1.1
    _, again = merged(model.merge_adapter)
    assert_reported(afa.merge_report(model), again, before, weights(model), wanted)
    after_unload, more = merged(model.merge_and_unload)
    assert not more and afa.merge_report(after_unload) == afa.merge_report(plain), "nothing was merged a second time"


@pytest.mark.parametrize("make", [injected, peft_model])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [1e-4, 0.01])
def test_a_merge_into_dense_weights_says_what_they_keep(make, dtype, share):
    model = make("dense", share, dtype)
    before, wanted = weights(model), wanted_of(model)
    action = model.merge_adapter if make is peft_model else lambda: afa.merge(model)
    _, warned = merged(action)
    total = assert_reported(afa.merge_report(model), warned, before, weights(model), wanted)
    assert (total < 0.9) == bool(warned) == (dtype is torch.bfloat16 and share == 1e-4)
    assert not merged(action)[1], "nothing is merged twice"
    model.unmerge_adapter() if make is peft_model else afa.unmerge(model)
    with pytest.raises(ValueError, match="model: expected one that is merged, got"):
        afa.merge_report(model)
    plain = model.unload() if make is peft_model else afa.unload(model)
    with pytest.raises(ValueError, match="model: expected one that is merged, got Net"):
        afa.merge_report(plain)


@pytest.mark.filterwarnings("ignore")
def test_several_adapters_and_plain_ones_are_reported_together():
    for cls in (AFALoraConfig, LoraConfig):
        model = peft_model("bnb-4bit", 0.05, adapters=("default", "other"), cls=cls)
        before, wanted = weights(model), wanted_of(model)
        _, warned = merged(lambda model=model: model.merge_adapter(["default", "other"]))
        assert_reported(afa.merge_report(model), warned, before, weights(model), wanted)
        model.unmerge_adapter()
        for count, name in enumerate(("default", "other"), 1):  # one after the other they are summed
            model.merge_adapter([name])
            norms = [sum_of(model.q_proj, [each]).square().sum().item() for each in ("default", "other")[:count]]
            assert model.q_proj.kept.wanted == pytest.approx(sum(norms), rel=1e-4)


def test_a_layer_alone_and_a_training_that_merges_say_it_too():
    net = injected("dense", 1e-4, torch.bfloat16)
    assert "AFALinear keeps 0." in merged(net.q_proj.merge)[1][0] and net.q_proj.kept.fraction < 0.9
    assert not merged(net.q_proj.merge)[1]
    model = peft_model("dense", 1e-4, torch.bfloat16)
    annealer = Annealer(lambda step: 0.0, "warn", True, {}, None)
    annealer.begin(model, 1, 0)
    _, warned = merged(lambda: annealer.end("over"))
    assert len(warned) == 1 and "2 of 2 merged layers" in warned[0]


# --- dequantize


def assert_holds(model, before, wanted, rounding):
    """Dense layers hold the sums, rounded once."""
    for name, layer in layers(model).items():
        weight, exact = layer.base_layer.weight, before[name] + wanted[name]
        assert type(layer.base_layer) is nn.Linear and not weight.requires_grad
        of_the_sum = 2**-22 * (wanted[name].abs().max() + exact.abs())  # in float32
        half_a_step = rounding * torch.exp2(torch.floor(torch.log2(exact.abs())))
        assert bool(((weight.double() - exact).abs() <= half_a_step + of_the_sum).all())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.parametrize(
    "make, kind", [(peft_model, kind) for kind in QUANTIZED] + [(injected, kind) for kind in QUANTIZED]
)
def test_dequantize_merges_into_dense_layers_and_unmerging_brings_the_quantized_ones_back(make, kind, share):
    model, x = make(kind, share).eval(), torch.randn(5, WIDTHS[0], requires_grad=True)
    before, wanted, y, state = weights(model), wanted_of(model), model(x), set(model.state_dict())
    bases = {name: layer.base_layer for name, layer in layers(model).items()}
    merge, unmerge, unload = (
        (lambda **o: model.merge_adapter(**o), lambda: model.unmerge_adapter(), lambda: model.unload())
        if make is peft_model
        else (lambda **o: afa.merge(model, **o), lambda: afa.unmerge(model), lambda: afa.unload(model))
    )
    _, warned = merged(lambda: merge(dequantize=True))
    assert not any(layer.base_layer.training for layer in layers(model).values())
    assert not warned and all(abs(f - 1) < 1e-4 for f in afa.merge_report(model).layers.values())
    tolerance = {"rtol": 3e-3, "atol": 3e-3} if kind == "bnb-8bit" else {}  # computes in float16
    torch.testing.assert_close(model(x), y, **tolerance)
    assert_holds(model, before, wanted, 2**-24)
    unmerge()
    assert {name: layer.base_layer for name, layer in layers(model).items()} == bases
    assert torch.equal(model(x), y) and set(model.state_dict()) == state
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())
    merge(dequantize=torch.bfloat16)
    assert_holds(model, before, wanted, 2**-8)
    report, plain = afa.merge_report(model), unload()
    assert afa.merge_report(plain) == report and all(type(m) is nn.Linear for m in plain.children())
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers(plain).values())


@pytest.mark.filterwarnings("ignore")
def test_dequantize_leaves_layers_without_the_adapter_as_they_are():
    model = peft_model("bnb-4bit", 0.1)
    model.add_adapter("one", config(target_modules=["q_proj"]))
    afa.set_alpha_t(model, 0.0, "one")
    model.merge_adapter(["one"], dequantize=True)
    assert type(model.q_proj.base_layer) is nn.Linear and type(model.v_proj.base_layer).__name__ == "Linear4bit"
    assert not model.v_proj.merged and afa.merge_report(model).layers == {"q_proj": 1.0}, "B = 0"


@pytest.mark.filterwarnings("ignore")
def test_dequantize_adds_the_bias_of_an_adapter_too():
    model = fill_adapters(get_peft_model(made("bnb-4bit"), config(lora_bias=True))).train()
    afa.set_alpha_t(model, 0.0)
    x = torch.randn(5, WIDTHS[0], requires_grad=True)
    y = model(x)
    model.merge_adapter(dequantize=True)  # into a layer with a bias, and into one without
    torch.testing.assert_close(model(x), y)
    assert model.q_proj.base_layer.training
    model.unmerge_adapter()
    assert model.v_proj.base_layer.bias is None and torch.equal(model(x), y)


@pytest.mark.filterwarnings("ignore")
def test_what_dequantize_refuses_leaves_everything_as_it_was():
    model = peft_model("bnb-4bit", 0.1, adapters=("default", "other"))
    before = weights(model)

    def refused(action, error, match):
        with pytest.raises(error, match=match):
            action()
        assert not any(layer.merged for layer in layers(model).values())
        assert all(torch.equal(w, before[name]) for name, w in weights(model).items())

    refused(lambda: model.merge_adapter(dequantize="yes"), TypeError, "dequantize: expected a bool or .*, got 'yes'")
    refused(lambda: afa.merge(dense(), dequantize=1), TypeError, "dequantize: expected .* got 1")
    afa.set_alpha_t(model, 0.5, "other")
    refused(lambda: model.merge_and_unload(dequantize=True), ValueError, "alpha_t of adapter 'other' is 0.5")
    afa.set_alpha_t(model, 0.0, "other")
    kept = model.v_proj.lora_B["other"].weight[0, 0].item()
    model.v_proj.lora_B["other"].weight.data[0, 0] = torch.inf
    refused(lambda: model.merge_adapter(dequantize=True), ValueError, "would not be finite")
    model.v_proj.lora_B["other"].weight.data[0, 0] = kept
    for name in TARGETS:
        getattr(model, name).base_layer.weight.quant_state.packing_format_for_cpu = True
    refused(lambda: model.merge_adapter(dequantize=True), ValueError, "merge: bitsandbytes repacked")
    for name in TARGETS:
        getattr(model, name).base_layer.weight.quant_state.packing_format_for_cpu = False
    for first in (False, True):  # quantized weights that hold one adapter, or dense ones
        model.merge_adapter(["default"], dequantize=first)
        with pytest.raises(ValueError, match="dequantize=True merges adapters together; unmerge default first"):
            model.merge_adapter(["other"], dequantize=True)
        assert all(layer.merged_adapters == ["default"] for layer in layers(model).values())
        model.unmerge_adapter()
    net = injected("quanto", 0.1)
    net.v_proj.lora_b.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="v_proj: merge: the merged weight would not be finite"):
        afa.merge(net, dequantize=True)
    assert not net.q_proj.merged and type(net.q_proj.base_layer).__name__ == "QLinear"


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_a_model_whose_layers_all_became_dense(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    library("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    own = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    transformers.LlamaForCausalLM(own).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    quantized = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = load(tmp_path / "base", quantization_config=quantized, dtype=torch.bfloat16, device_map="cpu")
    model = fill_adapters(get_peft_model(model, AFALoraConfig(target_modules="all-linear", r=4)))
    afa.set_alpha_t(model, 0.0)
    plain = model.merge_and_unload(dequantize=True)
    plain.save_pretrained(tmp_path / "dense")
    again, ids = load(tmp_path / "dense"), torch.arange(8)[None]
    assert again.dtype == torch.bfloat16  # which the int8 layers had forgotten, and the rest of the model has not
    assert torch.equal(again(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("architecture", ["Qwen3Moe", "GptOss"])  # experts as (E, N, K) and as (E, K, N)
@pytest.mark.parametrize("way", ["inject", "peft"])
def test_experts_say_what_their_weights_keep(architecture, way):
    pytest.importorskip("peft", minversion="0.19")
    library("transformers")
    import expert_models

    model = expert_models.mixture(architecture).bfloat16()
    experts, options = model.model.layers[1].mlp.experts, {"target_parameters": ["1.mlp.experts.down_proj"], "r": 2}
    if way == "peft":
        model = get_peft_model(model, AFALoraConfig(**options, target_modules=[]))
    else:
        afa.inject(model, **options)
    afa.set_alpha_t(expert_models.fill(model), 0.0)
    for name, parameter in model.named_parameters():
        parameter.data *= 1e-4 if "lora_b" in name.lower() else 1
    before = experts.down_proj.detach().double()
    if way == "peft":
        wanted = model.base_model.model.model.layers[1].mlp.experts.get_delta_weight("default").double()
    else:
        layer = experts.afa["down_proj"]
        wanted = layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
        wanted = wanted.mT if architecture == "GptOss" else wanted
    _, warned = merged(model.merge_adapter if way == "peft" else lambda: afa.merge(model))
    ((name, fraction),) = afa.merge_report(model).layers.items()
    change = experts.down_proj.detach().double() - before
    assert fraction == pytest.approx(((change * wanted).sum() / wanted.square().sum()).item(), rel=2e-2)
    assert "model.layers.1.mlp.experts" in name and fraction < 0.9 and len(warned) == 1
