"""Adapter checkpoints: round trips, stock PEFT, and files that are broken or foreign."""

import copy
import json
import os
import warnings

import pytest
import torch
from torch import nn

import afa_kernels as afa
from afa_kernels.model import named_layers

safetensors_torch = pytest.importorskip("safetensors.torch")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"up": nn.Linear(6, 12), "down": nn.Linear(12, 6)})
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body["down"](torch.relu(self.body["up"](x))))


def net():
    torch.manual_seed(0)
    return Net()


def wake(model, alpha_t=0.0):
    """Give every branch and every trainable module values of its own, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    afa.set_alpha_t(model, alpha_t)
    return model


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of an annealed Net whose head trained too, and the model."""
    model = wake(afa.inject(net(), "all-linear", r=2, trainable=["head"], activation="gelu"))
    afa.save_adapter(model, tmp_path)
    return tmp_path, model


X = torch.linspace(-2, 2, 24).view(4, 6)


def outputs(model):
    with torch.no_grad():
        if isinstance(model, Net):
            return model(X)
        return model(torch.arange(10).view(2, 5)).logits


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


def test_annealing_goes_on_where_it_was(tmp_path):
    model = wake(afa.inject(net()), alpha_t=0.3)
    with pytest.warns(UserWarning, match="alpha_t = 0.3"):
        afa.save_adapter(model, tmp_path)
    other = afa.load_adapter(net(), tmp_path)
    assert {layer.alpha_t for _, layer in named_layers(other)} == {0.3}
    assert torch.equal(outputs(other), outputs(model))
    assert not torch.allclose(outputs(other), outputs(wake(other, alpha_t=0.0)))


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


def test_16_bit_models(tmp_path):
    model = wake(afa.inject(net().to(torch.bfloat16)))
    afa.save_adapter(model, tmp_path)
    other = afa.load_adapter(net().to(torch.bfloat16), tmp_path)
    for (_, a), (_, b) in zip(named_layers(model), named_layers(other), strict=True):
        assert torch.equal(a.lora_b, b.lora_b) and b.lora_b.dtype == torch.float32


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


def test_stock_peft_warns_before_identity(tmp_path):
    model = wake(afa.inject(net()), alpha_t=0.5)
    with pytest.warns(UserWarning, match="stock PEFT"):
        afa.save_adapter(model, tmp_path)
    assert "alpha_t = 0.5" in json.loads((tmp_path / CONFIG).read_text())["afa_lora"]["note"]
    pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="afa_lora"):
        peft_model(net(), tmp_path)


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


# --- broken and foreign files, each with the model unchanged --------------------------------------


def refused(model, folder, match):
    before = copy.deepcopy(model.state_dict())
    modules = [(n, id(m)) for n, m in model.named_modules()]
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=match):
        afa.load_adapter(model, folder)
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trains
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key in before:
        assert torch.equal(after[key], before[key]), key


def targets():
    """A plain model and an injected one, with other values than the checkpoint."""
    injected = afa.inject(net(), "all-linear", r=2, trainable=["head"], activation="gelu")
    afa.set_alpha_t(injected, 0.75)
    return net(), injected


def test_the_checkpoint_of_these_tests_is_whole(saved):
    for model in targets():
        afa.load_adapter(model, saved[0])
        assert torch.equal(outputs(model), outputs(saved[1]))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_every_truncation_is_refused(saved, name):
    folder, _ = saved
    whole = (folder / name).read_bytes()
    for length in sorted({0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 2}):
        (folder / name).write_bytes(whole[:length])
        for model in targets():
            refused(model, folder, name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_foreign_and_missing_files_are_refused(saved, name):
    folder, _ = saved
    for content in (b"PK\x03\x04 a zip file of pickles", b"[1, 2]", b"\xff\xfe\x00", b"{}"):
        (folder / name).write_bytes(content)
        for model in targets():
            refused(model, folder, name)
    (folder / name).unlink()
    for model in targets():
        refused(model, folder, f"{name}.*no such file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type.*'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 3}, "r is 3"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"up": "x"}}, "alpha_pattern"),
        ({"modules_to_save": "head"}, "modules_to_save"),
        ({"modules_to_save": None}, "head|modules_to_save lacks head"),
        ({"modules_to_save": ["body", "head"]}, "inside one of modules_to_save"),
        ({"lora_dropout": 2}, "lora_dropout"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(saved, change, match):
    folder, _ = saved
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    for model in targets():
        refused(model, folder, match)


UP = "base_model.model.body.up"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(f"{UP}.lora_B.weight"), "body.up.lora_B.weight is missing"),
        (lambda t: t.pop(f"{UP}.lora_A.weight"), "body.up.lora_A.weight is missing"),
        (lambda t: t.pop("base_model.model.head.bias"), "head.bias is missing"),
        (lambda t: t.update({"base_model.model.extra": torch.ones(2)}), "extra belongs to nothing"),
        (lambda t: t.update({"up.weight": torch.ones(2)}), "up.weight is no PEFT name"),
        (
            lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(2, 7)}),
            r"body.up.lora_A.weight has shape \(2, 7\), the model needs \(2, 6\)",
        ),
        (
            lambda t: t.update({f"{UP}.lora_B.weight": torch.ones(12, 3)}),
            r"body.up.lora_B.weight has shape \(12, 3\), the model needs \(12, 2\)",
        ),
        (lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(12)}), "no floating-point matrix"),
        (
            lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(2, 6, dtype=torch.int8)}),
            "no floating-point matrix",
        ),
        (
            lambda t: t.update({"base_model.model.head.weight": torch.ones(3, 7)}),
            r"head.weight has shape \(3, 7\)",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.gone.lora_A.weight": torch.ones(2, 6),
                    "base_model.model.gone.lora_B.weight": torch.ones(6, 2),
                }
            ),
            "gone.lora_A.weight (belongs to no AFA layer|cannot be loaded: no such layer)",
        ),
        (lambda t: [t.pop(k) for k in list(t) if "lora" in k], "no LoRA tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, edit, match):
    folder, _ = saved
    tensors = safetensors_torch.load_file(folder / WEIGHTS)
    edit(tensors)
    safetensors_torch.save_file(tensors, folder / WEIGHTS)
    for model in targets():
        refused(model, folder, f"{WEIGHTS}: .*{match}")


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ("{", "not readable"),
        ("[1]", "format_version"),
        ('{"format_version": 2}', "format_version 2"),
        ('{"format_version": 1}', "no layers"),
        ('{"format_version": 1, "layers": {"body.up": {"alpha_t": 0.0}}}', "activation"),
        (
            '{"format_version": 1, "layers": {"body.up": {"alpha_t": 2, "activation": "silu"}}}',
            "alpha_t",
        ),
        (
            '{"format_version": 1, "layers": {"gone": {"alpha_t": 0.5, "activation": "silu"}}}',
            "gone is in the metadata and has no tensors",
        ),
        (
            '{"format_version": 1, "layers": {"body.up": {"alpha_t": 0.5, "activation": "silu"}}}',
            "body.down is missing in the metadata",
        ),
    ],
)
def test_metadata_that_does_not_fit_is_refused(saved, state, match):
    folder, _ = saved
    tensors = safetensors_torch.load_file(folder / WEIGHTS)
    safetensors_torch.save_file(tensors, folder / WEIGHTS, metadata={"afa_lora": state})
    for model in targets():
        refused(model, folder, f"{WEIGHTS}: .*{match}")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 3}, "r=2.*has 3"),
        ({"lora_alpha": 5}, "scaling"),
        ({"activation": "relu"}, "activation='gelu'.*'relu'"),
        ({"target_modules": ["up"]}, "body.down.lora_A.weight belongs to no AFA layer"),
        (
            {"target_modules": ["up", "down", "head"], "trainable": ()},
            "head.lora_A.weight is missing",
        ),
        ({"trainable": ["head", "norm"]}, "lacks norm"),
    ],
    ids=str,
)
def test_a_model_injected_otherwise_is_refused(saved, options, match):
    model = net()
    model.norm = nn.LayerNorm(6)
    ours = {"r": 2, "activation": "gelu", "trainable": ["head"]}
    afa.inject(model, **{**ours, **options})
    refused(model, saved[0], match)


def test_a_merged_model_is_refused(saved):
    _, model = targets()
    afa.set_alpha_t(model, 0.0)
    refused(afa.merge(model), saved[0], "is merged")


def test_a_model_with_other_sizes_is_refused(saved):
    model = net()
    model.body["up"] = nn.Linear(5, 12)
    refused(model, saved[0], "body.up.lora_A.weight has shape")
    model.body["up"] = nn.Conv1d(6, 12, 1)
    refused(model, saved[0], "body.up.lora_A.weight cannot be loaded: it is a Conv1d")


def test_an_interrupted_save_leaves_the_checkpoint_that_was_there(saved, monkeypatch):
    folder, model = saved
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def fail(*_args):
        raise OSError("no space left on device")

    wake(model)
    model.body["up"].lora_a.data.fill_(7.0)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        afa.save_adapter(model, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_reader_of_the_old_files_keeps_the_old_files(saved):
    folder, model = saved
    for name in (CONFIG, WEIGHTS):
        os.link(folder / name, folder / f"old-{name}")
    before = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    model.body["up"].lora_a.data.fill_(7.0)
    with pytest.warns(UserWarning):
        afa.save_adapter(wake(model, alpha_t=0.5), folder)
    for name in (CONFIG, WEIGHTS):
        assert (folder / name).read_bytes() != before[name]
        assert (folder / f"old-{name}").read_bytes() == before[name]


def test_saving_twice_replaces_and_leaves_no_other_file(saved):
    folder, model = saved
    model.body["up"].lora_a.data.fill_(7.0)
    afa.save_adapter(model, folder)
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert torch.equal(outputs(afa.load_adapter(net(), folder)), outputs(model))
