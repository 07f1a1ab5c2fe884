"""AFAPlugin on a stand-in of axolotl's plugin interface. In axolotl itself: test_stacks.py."""

import importlib
import sys
import types

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("pydantic")

from hf_models import assert_merges, llama
from peft import LoraConfig, PeftModel, get_peft_model
from test_callbacks import Recorder, trainer

from afa_kernels.peft import AFALoraConfig


class Configuration(dict):
    """axolotl's: keys are attributes too, and None where they are not set."""

    __getattr__ = dict.get


@pytest.fixture
def plugin(monkeypatch):
    """The plugin, made as axolotl makes it from the name in its configuration."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "afa_kernels.axolotl", raising=False)
    yield importlib.import_module("afa_kernels.axolotl").AFAPlugin()
    del sys.modules["afa_kernels.axolotl"]


def lora(**options):
    return get_peft_model(llama(), LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", **options))


def test_a_training_anneals_what_axolotl_made(plugin, tmp_path):
    cfg = Configuration(adapter="lora", afa={"activation": "gelu", "anneal": "cosine", "anneal_end_frac": 0.5})
    plugin.register(cfg)
    model, recorder = lora(), Recorder()
    plugin.post_lora_load(cfg, model)
    run = trainer(model, tmp_path, recorder)
    plugin.post_trainer_create(cfg, run)
    run.train()
    assert recorder.in_steps == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert recorder.logged[:4] == pytest.approx([0.5, 0.0, 0.0, 0.0])  # as a tracker sees it
    assert run.model.peft_config["default"].activation == "gelu"
    assert_merges(run.model, llama())


def test_without_a_block_the_defaults_hold(plugin):
    cfg = Configuration(adapter="qlora")
    plugin.register(cfg)
    model = lora()
    plugin.post_lora_load(cfg, model)
    made, default = model.peft_config["default"], AFALoraConfig()
    assert (made.activation, made.anneal_end_frac) == (default.activation, default.anneal_end_frac)


def test_fused_kernels_are_switched_off(plugin):
    """axolotl switches on those that are not set."""
    cfg = Configuration(adapter="lora", lora_o_kernel=None)
    plugin.register(cfg)
    kernels = {name: value for name, value in cfg.items() if name.endswith("_kernel")}
    assert set(kernels) == {f"lora_{name}_kernel" for name in ("mlp", "qkv", "o", "embedding")}
    assert all(value is False for value in kernels.values())


def test_an_adapter_that_is_not_trained_stays_a_lora(plugin, tmp_path):
    lora().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    plugin.post_lora_load(Configuration(adapter="lora", afa={}), model)
    assert type(model.peft_config["default"]) is LoraConfig


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"adapter": None}, ValueError, "adapter: AFAPlugin expects 'lora' or 'qlora', got None"),
        ({"lora_mlp_kernel": True}, ValueError, "lora_mlp_kernel: not possible with AFAPlugin"),
        ({"relora": True}, ValueError, "relora: not possible with AFAPlugin"),
        ({"use_scattermoe": True}, ValueError, "use_scattermoe: not possible with AFAPlugin"),
        ({"afa": {"activate": "silu"}}, ValueError, "afa: expected keys among activation, .* got activate"),
        ({"afa": {"r": 8}}, ValueError, "afa: expected keys among activation, .* got r"),
        ({"afa": {"activation": "step"}}, ValueError, "activation: expected one of"),
        ({"afa": {"anneal": "quick"}}, ValueError, "anneal: expected one of"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error_before_the_model_is_loaded(plugin, settings, error, message):
    with pytest.raises(error, match=message):
        plugin.register(Configuration({"adapter": "lora"} | settings))


def test_the_block_is_declared_as_axolotl_asks(plugin):
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(afa={"activation": "gelu"}).model_dump() == {"afa": {"activation": "gelu"}}
