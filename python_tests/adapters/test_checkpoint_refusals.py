"""Checkpoints that are broken, foreign or of another model, each with the model unchanged; interrupted saves."""

import copy
import json
import os

import pytest
import torch
from torch import nn

import afa_kernels as afa
from adapters.checkpoint_helpers import CONFIG, WEIGHTS, net, outputs, wake

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of an annealed Net whose head trained too, and the model."""
    model = wake(afa.inject(net(), "all-linear", r=2, trainable=["head"], activation="gelu"))
    afa.save_adapter(model, tmp_path)
    return tmp_path, model


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
        ('{"format_version": 2}', "expected format_version 1, got 2"),
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
