"""AFALoraConfig: the branch inside PEFT's layers is the operator, and at alpha_t = 0 it is PEFT's
LoRA."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
import torch._dynamo.testing
from peft import LoraConfig
from peft_models import TARGETS, Net, adapted, assert_same, gradients

import afa_kernels as afa
from afa_kernels.operator.activation import ACTIVATIONS
from afa_kernels.peft import AFALoraConfig

RELEASE = tuple(int(part) for part in peft.__version__.split(".")[:2])
PASSES_CONFIG = RELEASE >= (0, 19)  # to a layer that exists, for another adapter
MARKS_VARIANTS = RELEASE >= (0, 20)


def config(cls=AFALoraConfig, **options):
    return cls(**{"target_modules": list(TARGETS), "r": 4, "lora_alpha": 6} | options)


class Branch(nn.Module):
    """The layer as a user would write it in torch ops."""

    def __init__(self, layer, activation):
        super().__init__()
        self.layer, self.activation = layer, activation
        self.alpha_t = torch.tensor(layer.alpha_t, dtype=torch.float32).item()

    def forward(self, x):
        layer = self.layer
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        z = a(x.to(a.weight.dtype))
        h = (1 - self.alpha_t) * z + self.alpha_t * ACTIVATIONS[self.activation].value(z)
        y = layer.base_layer(x)
        return (y + b(h) * layer.scaling["default"]).to(y.dtype)


@pytest.mark.parametrize("alpha_t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,)], ids=["2d", "3d", "empty"])
def test_a_layer_is_the_formula(activation, alpha_t, leading):
    model = adapted(Net(torch.float64), config(activation=activation)).double()
    afa.set_alpha_t(model, alpha_t)
    plain = copy.deepcopy(model)
    for name in TARGETS:
        setattr(plain.base_model.model, name, Branch(getattr(plain, name), activation))
    x = torch.randn(*leading, 16, dtype=torch.float64)
    got, wanted = gradients(model, x), gradients(plain, x)
    assert len(got) == 6
    assert_same(got, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 11}},
        {"modules_to_save": ["head"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save", "gaussian"],
)
def test_at_identity_it_is_peft_lora(options):
    net = Net()
    ours = adapted(net, config(**options))
    stock = adapted(net, config(LoraConfig, **options))
    afa.set_alpha_t(ours, 0.0)
    x = torch.randn(2, 5, 16)
    got, wanted = gradients(ours, x), gradients(stock, x)
    assert_same(got, wanted)
    assert ours.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()


def test_lora_bias_is_added_and_trained():
    net = Net()
    net.v_proj = nn.Linear(24, 12)
    ours = adapted(net, config(lora_bias=True))
    stock = adapted(net, config(LoraConfig, lora_bias=True))
    for model in (ours, stock):
        for name in TARGETS:
            with torch.no_grad():
                getattr(model, name).lora_B["default"].bias.copy_(
                    torch.linspace(-1, 1, getattr(model, name).out_features)
                )
    afa.set_alpha_t(ours, 0.0)
    x = torch.randn(2, 5, 16)
    got, wanted = gradients(ours, x), gradients(stock, x)
    assert_same(got, wanted)
    torch.testing.assert_close(ours.merge_and_unload()(x), wanted["y"])


def test_the_base_output_is_accumulated_into(monkeypatch):
    """No second pass over the output: the product of the frozen layer is where the sum ends up."""
    ours = adapted(Net(), config())
    layer, products = ours.q_proj, []
    linear = torch.nn.functional.linear

    def recording(*args):
        products.append(linear(*args))
        return products[-1]

    monkeypatch.setattr(torch.nn.functional, "linear", recording)
    y = layer(torch.randn(2, 5, 16, requires_grad=True))
    assert len(products) == 1 and products[0].data_ptr() == y.data_ptr()
    assert type(y.grad_fn.next_functions[0][0]).__name__ != "CopySlices"


def test_no_widened_copy_of_the_input_is_made_or_kept():
    ours = adapted(Net(torch.bfloat16), config())
    x = torch.randn(50, 16, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    def note(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ours.q_proj(x).sum().backward()
    of_inputs = [t for t in kept if t.dim() == 2 and t.shape[0] == 50 and t.shape[1] > 4]
    assert of_inputs and all(t.data_ptr() == x.data_ptr() for t in of_inputs)
    assert ours.q_proj._cast_input_dtype(x, torch.float32) is x


def test_a_hook_sees_the_output_of_the_base_layer_unchanged():
    ours = adapted(Net(), config())
    layer, seen = ours.q_proj, []
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    x = torch.randn(2, 5, 16)
    y = layer(x)
    torch.testing.assert_close(seen[0], nn.functional.linear(x, *layer.base_layer.parameters()))
    assert not torch.allclose(y, seen[0])


def test_hooks_on_the_adapter_run():
    """Sharding and tensor parallelism work by hooks on A and B: then these are called as layers."""
    ours = adapted(Net(), config(lora_bias=False))
    afa.set_alpha_t(ours, 0.4)
    x = torch.randn(2, 5, 16)
    fused = gradients(ours, x)
    calls = []
    for name in TARGETS:
        getattr(ours, name).lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    composed = gradients(ours, x)
    assert len(calls) == 2
    assert_same(composed, fused)


def test_the_state_dict_is_that_of_peft():
    ours, stock = adapted(Net(), config()), adapted(Net(), config(LoraConfig))
    assert ours.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_qalora": True}],
    ids=lambda o: next(iter(o)),
)
def test_other_branches_are_refused_with_a_reason(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}: not possible with AFALoraConfig: "):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, "activation: expected one of"),
        ({"alpha_t": 1.5}, r"alpha_t: expected a value in \[0, 1\], got 1.5"),
        ({"anneal": "quick"}, "^anneal: expected one of"),
        ({"anneal_start": -1.0}, "^anneal_start: expected a value"),
        ({"anneal_end_frac": 2.0}, "^anneal_end_frac: expected a fraction"),
        ({"anneal_begin_frac": 0.9}, "^anneal_begin_frac: expected at most anneal_end_frac=0.8, got 0.9"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_initialisations_that_change_the_base_weights_warn():
    with pytest.warns(UserWarning, match="does not start as the base model"):
        config(init_lora_weights="pissa")


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Embedding(7, 16), {}, "an? Embedding layer of PEFT has no seam"),
        (nn.Conv2d(3, 4, 3), {}, "Conv2d layer of PEFT has no seam"),
    ],
    ids=["embedding", "conv"],
)
def test_layers_that_cannot_run_it_are_refused(module, options, message):
    net = nn.Sequential()
    net.target = module
    with pytest.raises(ValueError, match=message):
        adapted(net, config(target_modules=["target"], **options))


def test_a_configuration_that_was_trained_starts_anew_in_another_model():
    shared = config()
    first = adapted(Net(), shared)
    afa.set_alpha_t(first, 0.0)
    second = adapted(Net(), shared)
    assert second.q_proj.alpha_t == second.v_proj.alpha_t == shared.alpha_t == 1.0
    assert first.q_proj.alpha_t == first.peft_config["default"].alpha_t == 0.0
    afa.set_alpha_t(second, 0.0)
    if PASSES_CONFIG:
        first.add_adapter("again", shared)
        first.set_adapter("again")
        assert first.q_proj.alpha_t == first.v_proj.alpha_t == 1.0
