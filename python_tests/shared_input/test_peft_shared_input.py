"""Layers of PEFT on the fused path: base and branch in one call, and layers that read the same x together."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from peft_models import assert_same, fill_adapters, gradients

import afa_kernels as afa
from afa_kernels.callbacks.annealer import Annealer
from afa_kernels.model import sharing as shared_input
from afa_kernels.peft import AFALoraConfig, accelerate, restore

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Attention(nn.Module):
    """The linear layers of an attention, called as its code calls them."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(24, 32, dtype=dtype), nn.Linear(24, 16, bias=False, dtype=dtype)
        self.v_proj, self.o_proj = nn.Linear(24, 16, dtype=dtype), nn.Linear(32, 24, dtype=dtype)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.tanh(q) * torch.cat([k, v], -1))


@pytest.fixture
def shared(monkeypatch):
    """Counts the calls that computed several layers at once."""
    calls = []
    original = shared_input.linear_shared

    def counted(x, of_layers, **how):
        ys = original(x, of_layers, **how)
        calls.extend([] if ys is None else [len(ys)])
        return ys

    monkeypatch.setattr(shared_input, "linear_shared", counted)
    return calls


def config(**options) -> AFALoraConfig:
    return AFALoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options)


def adapted(net: nn.Module, lora) -> nn.Module:
    return fill_adapters(get_peft_model(copy.deepcopy(net), lora))


def hooked(model: nn.Module) -> list[nn.Module]:
    """Return the modules that open and close a shared input."""
    return [m for m in model.modules() if any(isinstance(getattr(h, "__self__", None), shared_input.SharedInput)
                                              for h in m._forward_pre_hooks.values())]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha_t", [0.5, 0.0])
def test_an_annealed_model_shares_its_inputs_once_it_is_driven(shared, dtype, alpha_t):
    net, x = Attention(dtype), torch.randn(2, 5, 24, dtype=dtype)
    apart, together = adapted(net, config()), adapted(net, config())
    afa.set_alpha_t(apart, alpha_t)
    afa.unshare_inputs(apart)
    want = gradients(apart, x)
    assert not shared
    afa.set_alpha_t(together, alpha_t)
    assert_same(gradients(together, x), want)
    assert shared == [3]


def test_the_callbacks_share_inputs_too(shared):
    model = adapted(Attention(), config())
    Annealer(None, "force", False, {}).begin(model, 10, 0)
    model(torch.randn(5, 24))
    assert shared == [3]


def test_accelerate_shares_inputs_and_restore_ends_it(shared):
    net, x = Attention(), torch.randn(2, 5, 24)
    stock = adapted(net, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    want = gradients(stock, x)
    model = accelerate(copy.deepcopy(stock))
    assert_same(gradients(model, x), want)
    assert shared == [3]
    restore(model)
    assert not hooked(model)
    assert_same(gradients(model, x), want)
    assert shared == [3]


def test_a_merged_model_is_left_without_shared_inputs():
    model = adapted(Attention(), config())
    afa.set_alpha_t(model, 0.0)
    x = torch.randn(5, 24)
    want = model(x)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), want)
    assert not hooked(plain)


def test_members_that_peft_has_to_run_are_left_to_it(shared):
    model = adapted(Attention(), config())
    afa.set_alpha_t(model, 0.5)
    x = torch.randn(5, 24)
    with model.disable_adapter():
        assert torch.equal(model(x), model.get_base_model()(x))
    model.add_adapter("other", config())
    fill_adapters(model, 1)
    model.base_model.set_adapter(["default", "other"])
    afa.set_alpha_t(model, 0.5)
    model(x)
    assert not shared
    model.set_adapter("other")
    model(x)
    assert shared == [3]


def case_of_two(model):
    model.add_adapter("other", config())
    fill_adapters(model, 1)
    model.base_model.set_adapter(["default", "other"])
    return ["default", "other"]


def case_of_a_hook(model):
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.base_layer.register_forward_hook(lambda _m, _x, y: y + 1)


def case_of_a_tensor(model):
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.scaling["default"] = torch.tensor(2.0)


@pytest.mark.parametrize("change", [None, case_of_two, case_of_a_hook, case_of_a_tensor])
def test_the_base_layer_is_called_only_where_it_has_to_be(monkeypatch, change):
    model, x = adapted(Attention(), config()), torch.randn(5, 24)
    names = (change(model) if change else None) or ["default"]
    afa.set_alpha_t(model, 0.5)
    got = gradients(model, x)
    layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
    calls = []
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: calls.append(m) or nn.functional.linear(x, m.weight, m.bias))
    y = layer(x)
    assert (layer.base_layer in calls) == (change is not None)
    want = layer.base_layer(x)
    for name in names:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        want = want + layer.scaling[name] * nn.functional.linear(0.5 * (z := x @ a.T) + 0.5 * nn.functional.silu(z), b)
    torch.testing.assert_close(y, want)
    assert torch.isfinite(got["dx"]).all()


@pytest.mark.parametrize("share_inputs", [None, False])
def test_a_schedule_leaves_shared_inputs_of_other_layers_as_they_are(share_inputs):
    """With PEFT's integration imported, too: it speaks for PEFT's layers alone."""
    model = afa.inject(nn.Sequential(Attention()), target_modules=TARGETS, r=2, share_inputs=share_inputs)
    before = list(model[0]._forward_pre_hooks)
    assert len(before) == (share_inputs is None)
    afa.set_alpha_t(model, 0.5)
    assert list(model[0]._forward_pre_hooks) == before
