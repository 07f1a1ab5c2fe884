"""Checkpoints with experts are PEFT's: stock PEFT loads ours at alpha_t = 0, and we load what stock PEFT wrote."""

import json
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("peft")

from expert_models import ARCHITECTURES, PARAMETERS, copy_of, fill, mixture, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import afa_kernels as afa

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def injected(base, **options):
    return fill(afa.inject(copy_of(base), **{"target_parameters": PARAMETERS, "r": 3, "lora_alpha": 5} | options))


@pytest.mark.filterwarnings("error::UserWarning:peft")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_peft_loads_ours(architecture, tmp_path):
    base, ids = mixture(architecture), tokens()
    ours = injected(base)
    afa.set_alpha_t(ours, 0.0)
    afa.save_adapter(ours, tmp_path)
    stock = PeftModel.from_pretrained(copy_of(base), str(tmp_path)).eval()
    torch.testing.assert_close(stock(ids).logits, ours(ids).logits)
    assert "afa_lora" not in json.loads((tmp_path / CONFIG).read_text())


def test_stock_peft_says_of_no_pattern_that_it_was_ignored(tmp_path):
    """PEFT 0.21 looks for the keys of patterns among modules only; here the modules have another rank than the
    experts."""
    base, ids = mixture(), tokens()
    ours = injected(base, target_modules=["q_proj"], r=4, expert_rank="per_active").eval()
    afa.set_alpha_t(ours, 0.0)
    afa.save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*did not match any targeted module")
        stock = PeftModel.from_pretrained(copy_of(base), str(tmp_path)).eval()
    torch.testing.assert_close(stock(ids).logits, ours(ids).logits)
    assert torch.equal(afa.load_adapter(copy_of(base), tmp_path)(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_we_load_what_stock_peft_wrote(architecture, tmp_path):
    base, ids = mixture(architecture), tokens()
    options = {"target_parameters": list(PARAMETERS), "target_modules": ["q_proj", "o_proj"], "r": 3, "lora_alpha": 5}
    stock = fill(get_peft_model(copy_of(base), LoraConfig(**options))).eval()
    stock.save_pretrained(tmp_path)
    ours = afa.load_adapter(copy_of(base), tmp_path)
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits)
    modules = [name for name in ("q_proj", "o_proj") if any(n.endswith(name) for n, _ in base.named_modules())]
    again = injected(base, target_modules=modules)
    torch.testing.assert_close(afa.load_adapter(again, tmp_path)(ids).logits, stock(ids).logits)


def test_one_parameter_and_dropout(tmp_path):
    """PEFT refuses dropout beside parameters, so a checkpoint has none; a single wrapper is not nested."""
    base, ids = mixture(), tokens()
    for parameter in PARAMETERS:
        ours = injected(base, target_parameters=[parameter], dropout=0.2).eval()
        afa.set_alpha_t(ours, 0.0)
        afa.save_adapter(ours, tmp_path)
        assert not any("base_layer" in name for name in load_file(tmp_path / WEIGHTS))
        stock = PeftModel.from_pretrained(copy_of(base), str(tmp_path)).eval()
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.popitem(), "is missing"),
        (lambda t, c: c.update(r=2), "r is 2 for model.layers.0.mlp.experts"),
        (lambda t, c: c.update(target_parameters=["experts.other"]), "'experts.other' matches no parameter"),
        (lambda t, c: c.update(target_parameters="down_proj"), "target_parameters is missing or not usable"),
        (lambda t, c: t.update({k: v[:-1] for k, v in t.items() if "lora_A" in k}), "the model has 5 experts"),
        (lambda t, c: t.update({k: v[:-1] for k, v in t.items() if "lora_B" in k}), "the model needs"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    base = mixture()
    ours = injected(base)
    afa.set_alpha_t(ours, 0.0)
    afa.save_adapter(ours, tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    change(tensors, config)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    before = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match=message):
        afa.load_adapter(base, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_an_experts_module_alone_has_no_name_in_a_checkpoint(tmp_path):
    experts = mixture().model.layers[0].mlp.experts
    afa.inject(experts, target_parameters=["down_proj"])
    with pytest.raises(ValueError, match="got an Qwen3MoeExperts, which has no name"):
        afa.save_adapter(experts, tmp_path)


def test_a_router_that_trains_is_saved_and_experts_that_train_are_refused(tmp_path):
    base, ids = mixture(), tokens()
    ours = injected(base, trainable=["mlp.gate"])
    with torch.no_grad():
        ours.model.layers[1].mlp.gate.weight.add_(0.5)
    afa.set_alpha_t(ours, 0.0)
    afa.save_adapter(ours, tmp_path)
    for loaded in (PeftModel.from_pretrained(copy_of(base), str(tmp_path)), afa.load_adapter(copy_of(base), tmp_path)):
        torch.testing.assert_close(loaded.eval()(ids).logits, ours(ids).logits)
    ours.model.layers[0].mlp.experts.down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match=r"experts\.down_proj trains"):
        afa.save_adapter(ours, tmp_path)
