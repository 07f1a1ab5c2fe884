"""Any rank from 1 on: what no kernel takes falls to a backend that takes everything."""

import pytest
import torch
from helpers import Problem, assert_matches, eager
from torch import nn

import afa_kernels as afa

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("alpha_t", [0.3, 0.0])
@pytest.mark.parametrize("r", [129, 257, 300])
def test_the_operator(r, alpha_t, dtype):
    problem = Problem.random(9, 40, 24, r, dtype)

    def ours(**tensors):
        return afa.afa_linear(*(tensors[n] for n in ("x", "weight", "bias", "lora_a", "lora_b")), alpha_t)

    def plain(x, weight, bias, lora_a, lora_b):
        return eager(x, lora_a, lora_b, alpha_t, weight=weight, bias=bias)

    assert_matches(ours, plain, problem, ("x", "weight", "bias", "lora_a", "lora_b"))


def test_the_plan_says_who_passes_and_who_computes():
    x, a, b = torch.randn(4, 40), torch.randn(300, 40), torch.randn(24, 300)
    plan = afa.plan(x, a, b, 0.5)
    assert plan.backend == "torch" and "ranks up to 256, got 300" in plan.reason


def test_a_named_backend_says_what_it_takes():
    x, a, b = torch.randn(4, 40), torch.randn(300, 40), torch.randn(24, 300)
    with pytest.raises(afa.BackendUnavailable, match="cpu.*ranks up to 256, got 300"):
        afa.afa_lora(x, a, b, 0.5, backend="cpu")


def test_layers_models_and_shared_inputs():
    model = nn.ModuleDict({name: nn.Linear(40, 24) for name in ("q_proj", "k_proj", "v_proj")})
    model.forward = lambda x: model["q_proj"](x) + model["k_proj"](x) * model["v_proj"](x)
    afa.inject(model, r=300, share_inputs=True)
    for layer in model.values():
        nn.init.normal_(layer.lora_b, std=0.1)
    x = torch.randn(3, 40)
    y = model(x)
    y.sum().backward()
    separate = [layer(x) for layer in model.values()]
    torch.testing.assert_close(y, separate[0] + separate[1] * separate[2])
    afa.set_alpha_t(model, 0.0)
    before = model(x)
    afa.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_peft():
    peft = pytest.importorskip("peft")
    from peft_models import TARGETS, Net, adapted, assert_same, gradients

    from afa_kernels.peft import AFALoraConfig, accelerate

    net, options = Net(widths=(40, 24, 12)), {"r": 300, "target_modules": list(TARGETS)}
    x = torch.randn(3, 40)
    plain = gradients(adapted(net, peft.LoraConfig(**options)), x)
    annealed = adapted(net, AFALoraConfig(**options))
    afa.set_alpha_t(annealed, 0.0)
    for model in (annealed, accelerate(adapted(net, peft.LoraConfig(**options)))):
        assert_same(gradients(model, x), plain)
