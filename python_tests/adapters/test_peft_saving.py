"""Saved adapters: stock PEFT reads them, and alpha_t and the activation come back."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft_models import TARGETS, Net, adapted

import afa_kernels as afa
from adapters.test_peft_adapter import config
from afa_kernels.peft import AFALoraConfig

LOAD_IN_STOCK_PEFT = """
import sys, warnings
import torch
from peft import PeftModel
sys.path.insert(0, sys.argv[1])
net, x, wanted = torch.load(sys.argv[2], weights_only=False)
warnings.simplefilter("error", UserWarning)  # not deprecations, of whatever library
model = PeftModel.from_pretrained(net, sys.argv[3])
assert not any(name.startswith("afa_kernels") for name in sys.modules), "not stock PEFT"
assert type(model.peft_config["default"]).__name__ == "LoraConfig"
layers = [m for m in model.modules() if type(m).__module__ == "peft.tuners.lora.layer"]
assert len(layers) == 2
torch.testing.assert_close(model(x), wanted)
torch.testing.assert_close(model.merge_and_unload()(x), wanted)
"""


def sequential():
    """A network that a process can unpickle without the modules of this folder."""
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12))


def test_an_annealed_adapter_is_a_lora_to_stock_peft(tmp_path):
    net = sequential()
    model = adapted(net, config(target_modules=["0", "2"], activation="gelu", use_rslora=True))
    afa.set_alpha_t(model, 0.0)
    x = torch.randn(3, 16)
    model.save_pretrained(tmp_path / "adapter")
    torch.save((net, x, model(x).detach()), tmp_path / "case.pt")
    script = tmp_path / "script.py"
    script.write_text(LOAD_IN_STOCK_PEFT)
    arguments = [str(tmp_path), str(tmp_path / "case.pt"), str(tmp_path / "adapter")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_configuration_comes_back(tmp_path):
    model = adapted(Net(), config(activation="tanh", anneal="cosine", anneal_end_frac=0.5, r=3))
    afa.set_alpha_t(model, 0.0)
    model.save_pretrained(tmp_path)
    loaded = AFALoraConfig.from_pretrained(tmp_path)
    assert (loaded.activation, loaded.anneal, loaded.anneal_end_frac) == ("tanh", "cosine", 0.5)
    assert (loaded.alpha_t, loaded.r, set(loaded.target_modules)) == (0.0, 3, set(TARGETS))
    assert loaded.schedule(10)(5) == 0.0 and loaded.schedule(10)(0) == 1.0


def test_training_continues_from_a_saved_adapter(tmp_path):
    net = Net()
    model = adapted(net, config())
    afa.set_alpha_t(model, 0.4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net, tmp_path, config=AFALoraConfig.from_pretrained(tmp_path), is_trainable=True)
    loaded(torch.randn(3, 16)).sum().backward()
    assert loaded.q_proj.lora_A["default"].weight.grad is not None


def test_weights_are_loaded_onto_the_meta_device_first(tmp_path):
    net, x = Net(), torch.randn(3, 16)
    model = adapted(net, config())
    afa.set_alpha_t(model, 0.4)
    model.save_pretrained(tmp_path)
    saved = AFALoraConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net, tmp_path, config=saved, low_cpu_mem_usage=True)
    torch.testing.assert_close(loaded(x), model(x))


def test_modules_to_save_come_back(tmp_path):
    net, x = Net(), torch.randn(3, 16)
    model = adapted(net, config(modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].bias.fill_(7.0)
    afa.set_alpha_t(model, 0.0)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net, tmp_path)(x), model(x))


def test_configurations_that_are_no_lora_are_refused(tmp_path):
    PromptTuningConfig(num_virtual_tokens=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type: expected the configuration of a LoRA"):
        AFALoraConfig.from_pretrained(tmp_path)


def test_a_state_of_another_version_is_refused(tmp_path):
    adapted(Net(), config()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved["afa_lora"]["format_version"] = 99
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="expected format_version 1, got 99"):
        AFALoraConfig.from_pretrained(tmp_path)


def test_one_configuration_for_two_adapters(tmp_path):
    """Each stands, and is saved, where its layers stand."""
    shared = config()
    model = get_peft_model(Net(), shared)
    model.add_adapter("two", shared)
    afa.set_alpha_t(model, 0.0, "default")
    afa.set_alpha_t(model, 0.5, "two")
    model.save_pretrained(tmp_path)
    assert AFALoraConfig.from_pretrained(tmp_path).alpha_t == 0.0
    assert AFALoraConfig.from_pretrained(tmp_path / "two").alpha_t == 0.5
    assert shared.alpha_t == 1.0
    PeftModel.from_pretrained(Net(), tmp_path)  # stock PEFT: finished, a LoRA


def test_one_configuration_for_two_models(tmp_path):
    shared = config()
    first, second = get_peft_model(Net(), shared), get_peft_model(Net(), shared)
    for layer in (first.q_proj, first.v_proj):
        layer.set_alpha_t(0.0)
    assert second.q_proj.alpha_t == 1.0
    afa.set_alpha_t(second, 0.25)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    saved = [AFALoraConfig.from_pretrained(tmp_path / name).alpha_t for name in ("first", "second")]
    assert saved == [0.0, 0.25]


@pytest.mark.parametrize("copied", [False, True])
def test_layers_that_differ_are_not_saved_in_the_format_of_peft(tmp_path, copied):
    model = adapted(Net(), config())
    afa.set_alpha_t(model, 0.0)
    model.save_pretrained(tmp_path)
    model = copy.deepcopy(model) if copied else model
    model.v_proj.set_alpha_t(0.5)
    with pytest.raises(ValueError, match="alpha_t: q_proj stands at 0 and v_proj stands at 0.5, and PEFT's format has"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):  # PEFT has replaced the weights
        PeftModel.from_pretrained(Net(), tmp_path)


def test_what_stock_peft_reads_at_identity_is_what_stock_peft_writes(tmp_path):
    options = {
        "use_rslora": True,
        "lora_dropout": 0.25,
        "rank_pattern": {"v_proj": 3},
        "task_type": "FEATURE_EXTRACTION",
    }
    for name, make in (("ours", AFALoraConfig), ("stock", LoraConfig)):
        model = adapted(sequential(), config(make, target_modules=["0", "2"], **options))
        if name == "ours":
            afa.set_alpha_t(model, 0.0)
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes(), file


def test_a_finished_lora_in_the_folder_of_an_unfinished_one(tmp_path):
    net, x = Net(), torch.randn(3, 16)
    for name in ("peft", "afa"):
        unfinished = adapted(net, config(activation="tanh"))
        afa.set_alpha_t(unfinished, 0.5)
        unfinished.save_pretrained(tmp_path / name)
    stock = adapted(net, config(LoraConfig), seed=1)
    stock.save_pretrained(tmp_path / "peft")
    injected = afa.inject(copy.deepcopy(net), TARGETS, r=4)
    nn.init.normal_(injected.q_proj.lora_b)
    afa.set_alpha_t(injected, 0.0)
    afa.save_adapter(injected, tmp_path / "afa")
    for name, wanted in (("peft", stock), ("afa", injected)):
        saved = AFALoraConfig.from_pretrained(tmp_path / name)
        assert saved.alpha_t == 0.0
        torch.testing.assert_close(
            PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / name, config=saved)(x), wanted(x)
        )
        torch.testing.assert_close(afa.load_adapter(copy.deepcopy(net), tmp_path / name)(x), wanted(x))


@pytest.mark.filterwarnings("ignore:.*saved at alpha_t")
def test_files_that_contradict_each_other_are_named(tmp_path):
    adapted(Net(), config(LoraConfig)).save_pretrained(tmp_path)
    beside = tmp_path / "afa_config.json"
    beside.write_text(json.dumps({"format_version": 1, "alpha_t": 0.5, "activation": "silu"}))  # of version 0.1
    with pytest.raises(ValueError, match="adapter_config.json says alpha_t = 0 and .*afa_config.json says 0.5"):
        AFALoraConfig.from_pretrained(tmp_path)
    beside.unlink()
    injected = afa.inject(Net(), TARGETS, r=4)
    afa.set_alpha_t(injected, 0.5)
    afa.save_adapter(injected, tmp_path)
    adapted(Net(), config(LoraConfig)).save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "adapter_config.json").replace(tmp_path / "adapter_config.json")
    for read in (AFALoraConfig.from_pretrained, lambda folder: afa.load_adapter(Net(), folder)):
        with pytest.raises(ValueError, match="adapter_config.json says alpha_t = 0 and .*safetensors says 0.5"):
            read(tmp_path)


def test_stock_readers_refuse_an_unfinished_adapter(tmp_path):
    model = adapted(Net(), config(bias="none", task_type="FEATURE_EXTRACTION"))
    afa.set_alpha_t(model, 0.5)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "alpha_t = 0.5" in saved["bias"]  # which vLLM refuses: it serves adapters with bias "none" alone
    others = adapted(Net(), config(LoraConfig)), adapted(Net(), config())
    for other in others:
        with (
            pytest.warns(UserWarning, match="afa_lora"),
            pytest.raises(ValueError, match="at alpha_t = 0.5, where the"),
        ):
            other.load_adapter(tmp_path, "second")
    loaded = AFALoraConfig.from_pretrained(tmp_path)
    assert (loaded.bias, loaded.task_type, loaded.alpha_t) == ("none", "FEATURE_EXTRACTION", 0.5)


def test_an_unfinished_adapter_is_saved_with_one_warning(tmp_path):
    fresh, driven = adapted(Net(), config()), adapted(Net(), config())
    driven.peft_config["default"].schedule(10).attach(driven)
    with pytest.warns(UserWarning, match="saved at 1, where stock PEFT and stock vLLM refuse it.*nothing has"):
        fresh.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="saved at 1, where stock PEFT and stock vLLM refuse it, .* a plain LoRA$"):
        driven.save_pretrained(tmp_path)
    finished = adapted(Net(), config())
    afa.set_alpha_t(finished, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (fresh, driven, finished):
            model.save_pretrained(tmp_path)


def test_an_adapter_of_pissa_becomes_a_lora_at_identity_only(tmp_path):
    net, x = Net(), torch.randn(3, 16)
    with pytest.warns(UserWarning, match="does not start as the base model"):
        model = get_peft_model(copy.deepcopy(net), config(init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    before = {file.name: file.read_bytes() for file in (tmp_path / "start").iterdir()}
    with torch.no_grad():
        for layer in (model.q_proj, model.v_proj):
            layer.lora_B["default"].weight.add_(0.1)
    afa.set_alpha_t(model, 0.5)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion: .*'pissa' .* alpha_t is 0.5"):
        model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert {file.name: file.read_bytes() for file in (tmp_path / "start").iterdir()} == before
    afa.set_alpha_t(model, 0.0)
    assert not torch.allclose(model(x), net(x))


def test_a_configuration_goes_through_its_dictionary(tmp_path):
    model = adapted(Net(), config(activation="gelu", anneal="cosine", anneal_end_frac=0.5))
    afa.set_alpha_t(model, 0.4)
    again = AFALoraConfig(**model.peft_config["default"].to_dict())
    assert (again.activation, again.anneal, again.anneal_end_frac, again.alpha_t) == ("gelu", "cosine", 0.5, 0.4)
