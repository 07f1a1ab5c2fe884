"""Checkpoints of adapters by name on the experts of a mixture."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("safetensors")

from expert_models import PARAMETERS, copy_of, fill, mixture, tokens
from test_experts import experts_of
from test_experts_adapters import ALPHAS, stacked

import afa_kernels as afa
from afa_kernels.model.adapted import named_layers


@pytest.mark.filterwarnings("error::UserWarning:peft")
@pytest.mark.parametrize("architecture", ["Qwen3Moe", "GptOss"])
def test_stock_peft_loads_one_of_them_and_gives_it_back(architecture, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.19")
    base, ids = mixture(architecture), tokens(3)
    model = stacked(copy_of(base), ["q_proj", "o_proj"], alphas=ALPHAS | {"bob": 0.0})
    with afa.adapters_of(model, "bob"):
        want = model(ids).logits
    afa.save_adapter(model, tmp_path / "bob", "bob")
    stock = peft.PeftModel.from_pretrained(copy_of(base), str(tmp_path / "bob")).eval()
    torch.testing.assert_close(stock(ids).logits, want)
    stock.save_pretrained(tmp_path / "stock")
    afa.load_adapter(model, tmp_path / "stock", "again")
    fresh = afa.load_adapter(copy_of(base), tmp_path / "stock", "mine")
    for each, name in ((model, "again"), (fresh, "mine")):
        with afa.adapters_of(each, name):
            assert torch.equal(each(ids).logits, want)


def test_one_adapter_is_saved_and_loaded_by_its_name(tmp_path):
    base, ids = mixture(), tokens(3)
    model = stacked(copy_of(base))
    with pytest.warns(UserWarning, match="saved at alpha_t = 0.7"):
        afa.save_adapter(model, tmp_path, "bob")
    with afa.adapters_of(model, "bob"):
        want = model(ids).logits.detach()
    torch.testing.assert_close(afa.load_adapter(copy_of(base), tmp_path)(ids).logits.detach(), want)
    with torch.no_grad():
        experts_of(model).afa["down_proj"].adapters["bob"].lora_b.zero_()
    afa.load_adapter(model, tmp_path, "bob")
    afa.load_adapter(model, tmp_path, "copy")
    for name in ("bob", "copy"):
        with afa.adapters_of(model, name):
            assert torch.equal(model(ids).logits, want)
    with pytest.raises(ValueError, match="was saved with r=5, the model's layer has 3"):
        afa.load_adapter(model, tmp_path, "ann")
    for message, other in (
        (
            "cannot be loaded: no such layer in the model has a stack",
            afa.inject(copy_of(base), "all-linear", adapters={"a": {}}),
        ),
        ("have one adapter, without a name", afa.inject(copy_of(base), target_parameters=PARAMETERS)),
    ):
        with pytest.raises(ValueError, match=message):
            afa.load_adapter(other, tmp_path, "bob")


def test_an_adapter_of_one_parameter(tmp_path):
    """Beside the other parameter, and in layers that it lacks, it is the frozen model."""
    base, ids = mixture(), tokens(3)
    small = fill(afa.inject(copy_of(base), target_parameters=["layers.1.mlp.experts.down_proj"], r=2))
    afa.set_alpha_t(small, 0.0)
    afa.save_adapter(small, tmp_path)
    model = afa.load_adapter(stacked(copy_of(base)), tmp_path, "small")
    assert [name for name, _ in named_layers(model, "small")] == ["model.layers.1.mlp.experts.down_proj"]
    with afa.adapters_of(model, "small"):
        torch.testing.assert_close(model(ids).logits, small(ids).logits)
    with afa.adapters_of(model, ["ann", "small", "__base__"]):
        logits = model(ids).logits
        torch.testing.assert_close(logits[1:2], small(ids[1:2]).logits)
        logits.sum().backward()
    assert len([name for name, p in model.named_parameters() if p.grad is not None and ".small." in name]) == 2
