"""Adapter checkpoints: round trips, and what stock PEFT makes of them."""

import json
import warnings

import pytest
import torch
from torch import nn

import afa_kernels as afa
from adapters.checkpoint_helpers import CONFIG, Net, X, net, outputs, wake
from afa_kernels.model.adapted import named_layers

safetensors_torch = pytest.importorskip("safetensors.torch")


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1,
        )
    ).eval()  # fmt: skip


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ).eval()


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_labels=3,
        )
    ).eval()  # fmt: skip


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
@pytest.mark.parametrize("make", [net, llama, gpt2, bert])
def test_what_was_saved_comes_back(tmp_path, make, injected):
    options = {"r": 3, "lora_alpha": 7, "activation": "gelu", "use_rslora": True}
    if make is bert:
        options["trainable"] = ["classifier"]
    model = wake(afa.inject(make(), **options))
    afa.save_adapter(model, tmp_path)
    other = afa.inject(make(), **options) if injected else make()
    assert afa.load_adapter(other, tmp_path) is other
    assert torch.equal(outputs(other), outputs(model))
    assert [n for n, _ in named_layers(other)] == [n for n, _ in named_layers(model)]
    assert {layer.activation for _, layer in named_layers(other)} == {"gelu"}
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in other.named_parameters() if p.requires_grad} == trains


def test_layers_of_different_kinds(tmp_path):
    def build():
        model = net().requires_grad_(False)
        model.body["up"] = afa.AFALinear(model.body["up"], r=2, lora_alpha=3, activation="relu")
        model.body["down"] = afa.AFALinear(model.body["down"], r=5, use_rslora=True)
        model.head = afa.AFALinear(model.head, r=2, lora_alpha=4, activation="sin")
        return model

    model = wake(build())
    model.body["up"].set_alpha_t(0.5)
    with pytest.warns(UserWarning):
        afa.save_adapter(model, tmp_path)
    for other in (net(), build()):
        afa.load_adapter(other, tmp_path)
        assert torch.equal(outputs(other), outputs(model))
        assert [m.alpha_t for _, m in named_layers(other)] == [0.5, 0.0, 0.0]
        assert [m.activation for _, m in named_layers(other)] == ["relu", "silu", "sin"]


def test_a_module_unfrozen_by_hand_is_saved_too(tmp_path):
    model = afa.inject(net(), ["up", "down"])
    model.head.requires_grad_(True)
    wake(model)
    afa.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["head"]
    assert torch.equal(outputs(afa.load_adapter(net(), tmp_path)), outputs(model))


def test_a_head_that_was_frozen_again_is_saved_too(tmp_path):
    model = wake(afa.inject(net(), trainable=["head"])).requires_grad_(False)
    afa.save_adapter(model, tmp_path)
    assert torch.equal(outputs(afa.load_adapter(net(), tmp_path)), outputs(model))


def test_what_a_lora_checkpoint_cannot_hold_is_refused(tmp_path):
    model = afa.inject(net())
    model.body["up"].base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="body.up.base_layer.bias trains"):
        afa.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_models_without_named_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="AFA layers"):
        afa.save_adapter(net(), tmp_path)
    with pytest.raises(ValueError, match="no name"):
        afa.save_adapter(afa.AFALinear(nn.Linear(3, 3)), tmp_path)


# --- stock PEFT -----------------------------------------------------------------------------------


def peft_model(base, folder):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(base, folder).eval()


def adapter_warnings(caught):
    """Return what was said about the checkpoint, without deprecations inside other packages."""
    return [str(w.message) for w in caught if not issubclass(w.category, (FutureWarning, DeprecationWarning))]


@pytest.mark.parametrize("make", [net, llama, gpt2, bert])
def test_stock_peft_computes_the_same_and_says_nothing(tmp_path, make):
    trainable = ["classifier"] if make is bert else ()
    model = wake(afa.inject(make(), r=3, lora_alpha=5, trainable=trainable))
    afa.save_adapter(model, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft_model(make(), tmp_path)
    assert not adapter_warnings(caught)
    torch.testing.assert_close(outputs_of_peft(loaded), outputs(model), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(outputs(model), outputs(make()), atol=1e-3)
    torch.testing.assert_close(
        outputs_of_peft(loaded.merge_and_unload()), outputs(afa.merge(model)), atol=1e-6, rtol=1e-5
    )


def outputs_of_peft(model):
    with torch.no_grad():
        inner = getattr(model, "base_model", model)
        if isinstance(getattr(inner, "model", inner), Net):
            return model(X)
        return model(torch.arange(10).view(2, 5)).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_of_different_kinds_in_stock_peft(tmp_path, rslora):
    model = net().requires_grad_(False)
    model.body["up"] = afa.AFALinear(model.body["up"], r=2, lora_alpha=3, use_rslora=rslora)
    model.body["down"] = afa.AFALinear(model.body["down"], r=5, use_rslora=True)
    model.head = afa.AFALinear(model.head, r=2, lora_alpha=4, use_rslora=rslora)
    wake(model)
    afa.save_adapter(model, tmp_path)
    torch.testing.assert_close(outputs_of_peft(peft_model(net(), tmp_path)), outputs(model))


def test_names_that_end_alike_are_kept_apart(tmp_path):
    """PEFT matches "up" to "body.up" as well, unless it is told a regular expression."""

    def build():
        model = net()
        model.up = nn.Linear(6, 6)
        model.forward = lambda x: Net.forward(model, model.up(x))
        return model

    model = wake(afa.inject(build(), "up"))
    assert [n for n, _ in named_layers(model)] == ["up"]
    afa.save_adapter(model, tmp_path)
    loaded = peft_model(build(), tmp_path)
    assert [n for n, _ in loaded.named_parameters() if "lora_A" in n] == ["base_model.model.up.lora_A.default.weight"]


@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
def test_a_lora_that_peft_trained_is_loaded_at_identity(tmp_path, injected):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 9}, modules_to_save=["lm_head"],
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = afa.load_adapter(llama(), tmp_path)
    if injected:
        ours = afa.load_adapter(wake(ours, alpha_t=0.5), tmp_path)
    assert {layer.alpha_t for _, layer in named_layers(ours)} == {0.0}
    torch.testing.assert_close(outputs(ours), outputs_of_peft(theirs), atol=1e-6, rtol=1e-5)
