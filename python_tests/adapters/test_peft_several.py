"""Several adapters, switching between them, mixed batches, merging; accelerate and restore."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft_models import TARGETS, Net, adapted, assert_same, fill_adapters, gradients

import afa_kernels as afa
from adapters.test_peft_adapter import MARKS_VARIANTS, PASSES_CONFIG, config
from afa_kernels.peft import AFALoraConfig, AFALoraLayer, accelerate, restore


def several(**options):
    """Return a model with the adapters default and other (both annealed) and plain."""
    model = get_peft_model(Net(), config(**options))
    model.add_adapter("other", config(activation="tanh", r=8))
    model.add_adapter("plain", config(LoraConfig))
    if not PASSES_CONFIG:
        accelerate(model)
    return fill_adapters(model)


def alone(model, name):
    """Return a function of x that only knows the adapter ``name``."""
    single = copy.deepcopy(model)
    single.set_adapter(name)
    return single


def test_each_adapter_has_its_own_alpha():
    model = several()
    x = torch.randn(3, 16)
    afa.set_alpha_t(model, 0.25)
    model.set_adapter("other")
    assert model.q_proj.alpha_t == 1.0
    afa.set_alpha_t(model, 0.75)
    assert model.peft_config["default"].alpha_t == 0.25
    assert model.peft_config["other"].alpha_t == 0.75
    other = model(x)
    model.set_adapter("plain")
    with pytest.raises(ValueError, match="no active adapter is annealed"):
        afa.set_alpha_t(model, 0.5)
    assert model.q_proj.alpha_t == 0.0 and not torch.allclose(model(x), other)
    model.set_adapter("default")
    assert model.q_proj.alpha_t == 0.25 and model.v_proj.alpha_t == 0.25


def test_two_active_adapters_add_up():
    model = several()
    layer, x = model.q_proj, torch.randn(2, 5, 16)
    base = layer.base_layer(x)
    wanted = base.clone()
    for name in ("default", "other", "plain"):
        wanted += alone(model, name).q_proj(x) - base
    model.base_model.set_adapter(["default", "other", "plain"])
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("alpha_t", [0.0, 0.5])
def test_a_mixed_batch_runs_each_row_with_its_adapter(alpha_t):
    model = several().eval()
    afa.set_alpha_t(model, alpha_t)
    names = ["other", "__base__", "default", "plain", "default"]
    x = torch.randn(5, 3, 16)
    y = model(x, adapter_names=names)
    base = copy.deepcopy(model).unload()
    for i, name in enumerate(names):
        row = x[i : i + 1]
        wanted = base(row) if name == "__base__" else alone(model, name)(row)
        torch.testing.assert_close(y[i : i + 1], wanted, msg=name)


def test_a_mixed_batch_of_plain_adapters_is_left_to_peft():
    model = several().eval()
    x = torch.randn(2, 16)
    y = model(x, adapter_names=["plain", "__base__"])
    torch.testing.assert_close(y[:1], alone(model, "plain")(x[:1]))


def test_delete_adapter():
    model = several()
    model.delete_adapter("other")
    assert list(model.q_proj.lora_afa) == [n for n in model.q_proj.lora_afa if n != "other"]
    assert "other" not in model.q_proj.lora_variant
    model(torch.randn(2, 16))


@pytest.mark.skipif(not MARKS_VARIANTS, reason="this PEFT does not know marked fields")
def test_a_plain_layer_refuses_an_annealed_adapter():
    """PEFT hands another adapter to the layer that is there, which would run it as a plain LoRA."""
    model = get_peft_model(Net(), config(LoraConfig))
    with pytest.raises(ValueError, match="unsupported variant combination.*activation"):
        model.add_adapter("annealed", config())


@pytest.mark.parametrize("first", ["accelerate", "add"])
def test_accelerate_makes_room_for_an_annealed_adapter(first):
    model = get_peft_model(Net(), config(LoraConfig))
    if first == "accelerate" and PASSES_CONFIG:
        accelerate(model)
        model.add_adapter("annealed", config())
    elif first == "add" and not MARKS_VARIANTS:
        model.add_adapter("annealed", config())
        accelerate(model)
    else:
        pytest.skip("not in this order with this PEFT")
    fill_adapters(model)
    model.set_adapter("annealed")
    assert model.q_proj.alpha_t == 1.0


def test_the_weight_of_an_adapter_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="get_delta_weight: alpha_t of adapter 'default' is 1"):
        several().q_proj.get_delta_weight("default")


def test_a_plain_adapter_is_not_merged_alone_where_an_annealed_one_is_active_too():
    model = several()
    model.base_model.set_adapter(["plain", "default"])
    before = model.q_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match="merge: alpha_t of adapter 'default' is 1"):
        model.merge_adapter()
    assert torch.equal(model.q_proj.base_layer.weight, before) and not model.q_proj.merged


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(safe_merge):
    model = several()
    afa.set_alpha_t(model, 0.0)
    x = torch.randn(2, 5, 16)
    y = model(x)
    before = model.q_proj.base_layer.weight.clone()
    model.merge_adapter(safe_merge=safe_merge)
    assert model.q_proj.merged and not torch.equal(model.q_proj.base_layer.weight, before)
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match="q_proj is merged, got 0.5"):
        afa.set_alpha_t(model, 0.5)
    model.unmerge_adapter()
    torch.testing.assert_close(model.q_proj.base_layer.weight, before)
    torch.testing.assert_close(model(x), y)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert isinstance(merged, Net)
    torch.testing.assert_close(merged(x), y)


def test_a_merge_that_a_weight_does_not_take_is_an_error(monkeypatch):
    model = adapted(Net(), config())
    afa.set_alpha_t(model, 0.0)
    layer, x = model.q_proj, torch.randn(5, 16)
    y = layer(x)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, other: t)
    with pytest.raises(RuntimeError, match="merge.*does not hold the sum"):
        layer.merge()
    monkeypatch.undo()
    assert not layer.merged and torch.equal(layer(x), y)


def test_a_merge_equals_that_of_peft():
    net = Net()
    ours, stock = adapted(net, config()), adapted(net, config(LoraConfig))
    afa.set_alpha_t(ours, 0.0)
    ours, stock = ours.merge_and_unload(), stock.merge_and_unload()
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_a_weighted_adapter_of_merged_ones():
    model = several()
    afa.set_alpha_t(model, 0.0)
    model.add_weighted_adapter(["default", "plain"], [1.0, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    assert model.q_proj.alpha_t == 0.0
    base, x = copy.deepcopy(model).unload(), torch.randn(3, 16)
    assert not torch.allclose(model(x), base(x))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "lora_bias": True}, {"rank_pattern": {"v_proj": 2}}],
    ids=["plain", "rslora-bias", "ranks"],
)
def test_accelerate_computes_what_peft_did(options):
    net = Net()
    net.v_proj = nn.Linear(24, 12)
    model = adapted(net, config(LoraConfig, **options))
    x = torch.randn(2, 5, 16)
    wanted = gradients(model, x)
    types = {name: type(module) for name, module in model.named_modules()}
    keys = model.state_dict().keys()
    assert accelerate(model) is model
    assert isinstance(model.q_proj, AFALoraLayer) and model.state_dict().keys() == keys
    got = gradients(model, x)
    assert_same(got, wanted)
    assert accelerate(model) is model, "twice is once"
    assert restore(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == types
    for name, value in gradients(model, x).items():
        assert torch.equal(value, wanted[name]), name
    torch.testing.assert_close(accelerate(model).merge_and_unload()(x), wanted["y"])


def test_accelerate_leaves_other_branches_alone():
    model = get_peft_model(Net(), config(LoraConfig, use_dora=True))
    with pytest.raises(ValueError, match="model: nothing to run on the kernels"):
        accelerate(model)
    model.add_adapter("plain", config(LoraConfig))
    fill_adapters(model)
    x = torch.randn(3, 16)
    dora = model(x)
    model.set_adapter("plain")
    plain = model(x)
    accelerate(model)
    torch.testing.assert_close(model(x), plain)
    model.set_adapter("default")
    assert torch.equal(model(x), dora)
    model.delete_adapter("plain")
    assert not model.q_proj.lora_afa
    model.add_adapter("again", config(LoraConfig))
    restore(accelerate(model))
    model.delete_adapter("again")
    assert torch.equal(model(x), dora)


def test_accelerate_says_why_it_cannot():
    with pytest.raises(ValueError, match="it has no plain LoRA layers"):
        accelerate(Net())
    net = nn.Sequential()
    net.table = nn.Embedding(7, 16)
    with pytest.raises(ValueError, match="Embedding layer of PEFT has no seam"):
        accelerate(get_peft_model(net, config(LoraConfig, target_modules=["table"])))


def test_a_scaling_that_is_a_tensor():
    """As PEFT makes it where adapters are to be swapped in a compiled model."""
    model = accelerate(adapted(Net(), config(LoraConfig)))
    x = torch.randn(2, 5, 16)
    y = model(x)
    for name in TARGETS:
        scaling = getattr(model, name).scaling
        scaling["default"] = torch.tensor(scaling["default"])
    torch.testing.assert_close(model(x), y)


def test_restore_refuses_layers_that_were_wrapped_since():
    model = accelerate(adapted(Net(), config(LoraConfig)))
    kind = type(model.q_proj)
    model.q_proj.__class__ = type("Sharded", (kind,), {})
    with pytest.raises(ValueError, match="the layer is a Sharded by now"):
        restore(model)


def test_restore_keeps_annealed_adapters():
    model = accelerate(several())
    afa.set_alpha_t(model, 0.5)
    restore(model)
    assert list(model.q_proj.lora_afa) == ["default", "other"] and model.q_proj.alpha_t == 0.5
    assert list(model.q_proj.lora_variant) == ["default", "other"]


def test_accelerate_gives_late_adapters_their_activation():
    """PEFT before 0.19 does not tell an existing layer which configuration its new adapter has."""
    model = get_peft_model(Net(), config(LoraConfig))
    model.peft_config["default"] = AFALoraConfig(target_modules=list(TARGETS), activation="tanh")
    accelerate(model)
    assert model.q_proj.alpha_t == 1.0
    assert model.q_proj.lora_afa["default"].activation == "tanh"


@pytest.mark.skipif(not PASSES_CONFIG, reason="PEFT does not pass the configuration to a layer that exists")
@pytest.mark.parametrize("stands", [0.0, 0.5])
def test_an_adapter_that_is_made_with_the_configuration_of_another_starts_where_that_stands(stands):
    """As TRL makes its reference: ``add_adapter("ref", model.peft_config["default"])`` and the same weights."""
    model = get_peft_model(Net(), config())
    fill_adapters(model)
    afa.set_alpha_t(model, stands)
    with pytest.warns(UserWarning, match=f"the new adapter 'ref' starts at {stands:g}, where the adapter stands whose"):
        model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    x = torch.randn(3, 16)
    y = model(x)
    afa.set_alpha_t(model, 0.25)
    model.set_adapter("ref")
    assert model.q_proj.alpha_t == model.v_proj.alpha_t == stands
    assert torch.equal(model(x), y)


COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune")


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_adapters_that_are_not_linear_are_not_combined(combination):
    model = get_peft_model(Net(), config())
    model.add_adapter("other", config(r=4))
    afa.set_alpha_t(model, 0.0, "other")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="add_weighted_adapter: alpha_t of adapter 'default' is 1, .*q_proj"):
        model.add_weighted_adapter(["other", "default"], [0.5, 0.5], "both", combination_type=combination, density=0.5)
    assert "both" not in model.peft_config and [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("function", [afa.merge, afa.unmerge, afa.unload])
def test_functions_for_injected_models_name_the_methods_of_peft(function):
    with pytest.raises(ValueError, match=r"found those of PEFT in PeftModel; use its own methods .*merge_and_unload"):
        function(several())


def test_a_model_of_peft_is_not_injected():
    model = several()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="q_proj is a layer of PEFT; .*add_activation"):
        afa.inject(model)
    assert [name for name, _ in model.named_modules()] == names


def test_a_plain_adapter_has_no_activation():
    """Beside an annealed one, in what a layer says of itself and in what its branch computes with."""
    model = accelerate(get_peft_model(Net(), config(LoraConfig)))
    layer = model.q_proj
    assert layer.lora_afa["default"].activation == "identity" and "relu" not in repr(layer)
    assert layer.linear_call(torch.zeros(1, layer.in_features)).options.spec.activation == "identity"
