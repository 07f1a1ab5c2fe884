"""add_activation: an adapter that PEFT made as a plain LoRA becomes what an AFALoraConfig would have made."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft_models import TARGETS, Net, adapted, assert_same, gradients
from torch import nn

from afa_kernels import set_alpha_t
from afa_kernels.peft import AFALoraConfig, AFALoraLayer, accelerate, add_activation


def config(cls=LoraConfig, **options):
    return cls(**{"target_modules": list(TARGETS), "r": 4, "lora_alpha": 6} | options)


@pytest.mark.parametrize("alpha_t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}, {"lora_bias": True}, {"modules_to_save": ["head"]}],
    ids=["plain", "rslora", "ranks", "bias", "modules_to_save"],
)
def test_it_is_the_adapter_that_the_configuration_makes(options, alpha_t):
    net, x = Net(), torch.randn(5, 16)
    made = adapted(net, config(AFALoraConfig, activation="tanh", **options))
    given = adapted(net, config(**options))
    parameters = dict(given.named_parameters())
    assert add_activation(given, "tanh") is given
    for model in (made, given):
        set_alpha_t(model, alpha_t)
    assert_same(gradients(given, x), gradients(made, x))
    assert given.state_dict().keys() == made.state_dict().keys()
    assert all(parameters[name] is p for name, p in given.named_parameters())  # an optimizer may have them


def test_it_starts_and_is_saved_as_its_options_say(tmp_path):
    model = adapted(Net(), config())
    add_activation(model, "gelu", anneal="linear", anneal_start=0.75, anneal_end_frac=0.5)
    assert model.q_proj.alpha_t == 0.75
    assert [model.q_proj.schedule(4)(step) for step in range(5)] == [0.75, 0.375, 0.0, 0.0, 0.0]
    model.save_pretrained(tmp_path)
    saved = AFALoraConfig.from_pretrained(tmp_path)
    assert (saved.activation, saved.alpha_t, saved.r, saved.target_modules) == ("gelu", 0.75, 4, set(TARGETS))


def test_an_annealed_one_is_a_lora_to_stock_peft(tmp_path):
    net, x = Net(), torch.randn(5, 16)
    model = add_activation(adapted(net, config()))
    before = model(x)
    set_alpha_t(model, 0.0)
    y = model(x)
    assert not torch.allclose(y, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)(x), y)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


def test_one_adapter_of_several():
    model, x = adapted(Net(), config()), torch.randn(5, 16)
    model.add_adapter("other", config(r=2))
    y = model(x)
    add_activation(model, adapter="other")
    assert type(model.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(model(x), y)  # the default one stays what it was
    model.set_adapter("other")
    assert model.q_proj.alpha_t == 1.0
    add_activation(model, "relu", adapter="default")
    model.set_adapter("default")
    assert model.q_proj.alpha_t == 1.0 and not torch.allclose(model(x), y, atol=1e-3)


def test_adapters_that_run_on_the_kernels_already():
    model, x = accelerate(adapted(Net(), config())), torch.randn(5, 16)
    y = model(x)
    add_activation(model)
    assert not torch.allclose(model(x), y, atol=1e-3)


def test_a_model_inside_another():
    """As TRL's model with a value head holds one."""
    model = nn.ModuleDict({"pretrained": adapted(Net(), config())})
    add_activation(model)
    assert isinstance(model["pretrained"].peft_config["default"], AFALoraConfig)
    assert model["pretrained"].q_proj.alpha_t == 1.0


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.tokens = nn.Linear(4, 4), nn.Embedding(5, 4)

    def forward(self, x):
        return self.q_proj(self.tokens(x))


def merged(model):
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (Net, {}, ValueError, "model: expected active LoRA adapters, found none in Net"),
        (lambda: adapted(Net(), config()), {"adapter": "b"}, ValueError, "expected a LoRA adapter 'b', found none"),
        (lambda: adapted(Net(), config()), {"activation": "step"}, ValueError, "activation: expected one of"),
        (lambda: adapted(Net(), config()), {"anneal_end_frac": 2.0}, ValueError, "end_frac"),
        (lambda: adapted(Net(), config()), {"end": 0.0}, TypeError, "'end'"),
        (lambda: adapted(Net(), config(AFALoraConfig)), {}, ValueError, "a plain LoRA, got its AFALoraConfig"),
        (lambda: adapted(Net(), config(use_dora=True)), {}, ValueError, "use_dora: not possible"),
        (lambda: merged(adapted(Net(), config())), {}, ValueError, "'default' cannot have an activation: it is merged"),
        (
            lambda: adapted(Embedded(), config(target_modules=["q_proj", "tokens"])),
            {},
            ValueError,
            "'default' cannot have an activation: a Embedding layer of PEFT has no seam",
        ),
    ],
    ids=["no PEFT", "no such", "activation", "schedule", "option", "twice", "dora", "merged", "embedding"],
)
def test_what_cannot_have_an_activation_is_named_and_stays(model, options, error, message):
    model = model()
    classes = [type(module) for module in model.modules()]
    configs = dict(getattr(model, "peft_config", {}))
    with pytest.raises(error, match=message):
        add_activation(model, **options)
    assert [type(module) for module in model.modules()] == classes
    assert getattr(model, "peft_config", {}) == configs
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert all(isinstance(layer, AFALoraLayer) is type(layer).__name__.startswith("AFA") for layer in layers)
