"""inject(target_parameters=...): the experts of a mixture compute the formula, each with its own branch."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", minversion="5.0")

import torch._dynamo.testing
from expert_models import (
    PARAMETERS,
    fill,
    gradients,
    mixture,
    routing,
    tokens,
)
from helpers import run_python

import afa_kernels as afa
from adapters.subjects import Branch, PlainExperts
from afa_kernels.layers import mixed


def injected(architecture="Qwen3Moe", **options):
    model = mixture(architecture)
    return fill(afa.inject(model, **{"target_parameters": PARAMETERS, "r": 3, "lora_alpha": 5} | options))


def experts_of(model, layer=1):
    return model.model.layers[layer].mlp.experts


def call(experts, *inputs):
    return experts(*inputs)


def in_torch_ops(experts, *inputs):
    """What ``experts`` with branches compute, in plain torch."""
    branches = [
        Branch(parameter, layer.lora_a, layer.lora_b, layer.scaling, layer.activation, layer)
        for parameter, layer in experts.afa.items()
    ]
    return PlainExperts(experts, branches)(*inputs)


def run(function, experts, x, index, weights, dy):
    """Return the output and every gradient of ``function(experts, x, index, weights)``."""
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    experts.zero_grad()
    y = function(experts, x, index, weights)
    y.backward(dy)
    named = {name: p.grad.clone() for name, p in experts.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad} | named


def test_modules_and_parameters_together():
    model = injected(target_modules=["q_proj", "v_proj"])
    ids = tokens()
    got = gradients(model, ids)
    assert len(got) == 1 + 2 * (2 * 2 + 2 * 2)
    afa.set_alpha_t(model, 0.0)
    want = model(ids).logits
    afa.merge(model)
    torch.testing.assert_close(model(ids).logits, want)


def test_no_modules_beside_parameters_as_peft_says_it():
    model = injected(target_modules=[])
    assert not any(isinstance(m, afa.AFALinear) for m in model.modules())
    with pytest.raises(ValueError, match="target_modules"):
        afa.inject(mixture(), target_modules=[])


def test_one_parameter_of_two():
    for parameter in ("gate_up_proj", "down_proj"):
        experts = experts_of(injected("GptOss", target_parameters=[f"experts.{parameter}"]))
        x, dy = torch.randn(9, 16), torch.randn(9, 16)
        got = run(call, experts, x, *routing(experts, 9), dy)
        torch.manual_seed(0)
        assert {n for n in got if "lora" in n} == {f"afa.{parameter}.lora_a", f"afa.{parameter}.lora_b"}
        index, weights = routing(experts, 9)
        torch.testing.assert_close(experts(x, index, weights), in_torch_ops(experts, x, index, weights))


class Undefined(torch.autograd.Function):
    """Rows from ``end`` on as a GPU may leave them, in the forward and in the backward."""

    @staticmethod
    def forward(ctx, rows, end):
        ctx.end = end
        return rows.index_fill(0, torch.arange(end, rows.shape[0]), float("nan"))

    @staticmethod
    def backward(ctx, dy):
        return dy.index_fill(0, torch.arange(ctx.end, dy.shape[0]), float("nan")), None


def test_pairs_of_other_processes_are_left_out(monkeypatch):
    """Under expert parallelism an index of num_experts stands for an expert that is elsewhere."""

    def as_on_a_gpu(x, *arguments, **options):
        end = int(options["offsets"][-1])
        return Undefined.apply(afa.afa_linear(Undefined.apply(x, end), *arguments, **options), end)

    monkeypatch.setattr(mixed, "afa_linear", as_on_a_gpu)
    for architecture in ("Qwen3Moe", "GptOss"):
        experts = experts_of(injected(architecture))
        experts._is_expert_parallel = True
        x, dy = torch.randn(9, 16), torch.randn(9, 16)
        index, weights = routing(experts, 9)
        index[::2, 0] = experts.num_experts
        index[4] = experts.num_experts
        got = run(call, experts, x, index, weights, dy)
        want = run(in_torch_ops, experts, x, index, weights, dy)
        want["dweights"] = want["dweights"].masked_fill(index == experts.num_experts, 0.0)
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], msg=lambda m, n=name: f"{n}: {m}")


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = torch.utils._pytree.tree_leaves(result)
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _dense(t)}
        for t in made:
            if _dense(t) and t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


def _dense(t):
    return isinstance(t, torch.Tensor)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("alpha_t", [0.0, 0.5])
def test_no_tensor_as_large_as_all_experts_is_made(alpha_t, autocast):
    options = {"num_experts": 16, "moe_intermediate_size": 48, "hidden_size": 64}
    experts = experts_of(fill(afa.inject(mixture(**options), target_parameters=PARAMETERS, r=2, dropout=0.1)))
    afa.set_alpha_t(experts, alpha_t)
    x = torch.randn(6, 64, requires_grad=True)
    index, weights = routing(experts.train(), 6)
    with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        experts(x, index, weights).sum().backward()
    assert 0 < largest.elements < experts.down_proj.numel() // 4


def test_tokens_of_another_dtype_than_the_weights():
    """Under autocast they may be of 16 bits; transformers brings them to the dtype of the weights."""
    frozen, experts = (experts_of(model) for model in (mixture(), injected()))
    for layer in experts.afa.values():
        torch.nn.init.zeros_(layer.lora_b)
    inputs = torch.randn(6, 16).bfloat16(), *routing(experts, 6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(experts(*inputs), frozen(*inputs))


def test_another_process_loads_a_saved_model(tmp_path):
    model, ids = injected(), tokens()
    torch.save((model, ids, model(ids).logits.detach()), tmp_path / "model.pt")
    run_python(
        f"import torch; model, ids, want = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "torch.testing.assert_close(model(ids).logits.detach(), want)"
    )


def test_what_stands_beside_merged_experts_is_not_loaded_alone():
    """Shown to it alone, a state dict cannot have the parameters of the experts."""
    beside = experts_of(injected()).afa
    afa.set_alpha_t(beside, 0.0)
    state = beside.state_dict()
    for layer in beside.values():
        layer.merge()
    with pytest.raises(RuntimeError, match="a branch of a merged layer cannot be loaded without its weight"):
        beside.load_state_dict(state)


def test_other_models_with_the_same_configuration_are_not_concerned(monkeypatch):
    base = mixture()
    other = type(base)(base.config)
    model = afa.inject(base, target_parameters=PARAMETERS)
    assert model.config is other.config and model.config._experts_implementation == "grouped_mm"
    assert "experts_implementation" not in str(model.config.to_dict())
    other(tokens())


def test_a_merged_model_runs_the_implementation_that_it_is_set_to():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = []

    def counted(experts, *args):
        calls.append(experts)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, *args)

    ALL_EXPERTS_FUNCTIONS.register("counted", counted)
    model, ids = injected(), tokens()
    afa.set_alpha_t(model, 0.0)
    model.config._experts_implementation = "counted"
    want = model(ids).logits
    assert not calls
    afa.merge(model)
    torch.testing.assert_close(model(ids).logits, want)
    assert len(calls) == 2
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(ids).logits, want)


def test_compiles_once_for_every_routing_and_alpha():
    experts = experts_of(injected())
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, backend=counter, fullgraph=True)
    schedule = afa.AnnealSchedule(6, end_frac=0.5).attach(experts)
    x = torch.randn(9, 16, requires_grad=True)
    for _ in range(6):
        index, weights = routing(experts, 9)
        torch.testing.assert_close(compiled(x, index, weights), experts(x, index, weights))
        compiled(x, index, weights).sum().backward()
        schedule.step()
    assert schedule.alpha_t == 0.0 and counter.frame_count == 2


def test_the_rank_of_an_expert():
    layer = experts_of(injected(r=8, lora_alpha=8, expert_rank="per_active")).afa["down_proj"]
    assert layer.lora_a.shape == (5, 4, 12) and layer.scaling == 2.0
    assert experts_of(injected(r=1, expert_rank="per_active")).afa["down_proj"].r == 1
    with pytest.raises(ValueError, match="expert_rank: expected one of same, per_active, got 'half'"):
        injected(expert_rank="half")
    model = mixture()
    experts_of(model).config = SimpleNamespace(_experts_implementation="grouped_mm")
    with pytest.raises(ValueError, match="has no num_experts_per_tok"):
        afa.inject(model, target_parameters=PARAMETERS, expert_rank="per_active")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_parameters": "experts.down_proj"}, TypeError, "target_parameters: expected a list of names"),
        ({"target_parameters": [3]}, TypeError, "target_parameters: expected names of parameters, got 3"),
        ({"target_parameters": ["experts.up_proj"]}, ValueError, "matches no parameter .* it has model.layers.0"),
        ({"target_parameters": ["gate.weight"]}, TypeError, "Router is not an experts module of transformers 5"),
        ({"target_parameters": ["q_proj.weight"]}, TypeError, "Linear is not an experts module"),
        ({"target_parameters": PARAMETERS, "r": 0}, ValueError, "r: expected a rank of at least 1"),
        ({"target_parameters": PARAMETERS, "dropout": 1.0}, ValueError, "dropout: expected"),
        ({"target_parameters": PARAMETERS, "dtype": torch.int8}, TypeError, "dtype: expected"),
    ],
)
def test_what_does_not_fit_is_named(options, error, message):
    model = mixture()
    with pytest.raises(error, match=message):
        afa.inject(model, **options)
    assert all(p.requires_grad for p in model.parameters())


class Wrapped(torch.Tensor):
    """As libraries wrap a quantized tensor: it says that it holds floating-point numbers."""


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), "float8"),
        (lambda t: t.detach().as_subclass(Wrapped), "a Wrapped of torch.float32"),
    ],
    ids=["float8", "wrapped"],
)
def test_quantized_experts_are_refused(quantize, message):
    model = mixture()
    experts = experts_of(model)
    experts.down_proj = nn.Parameter(quantize(experts.down_proj), requires_grad=False)
    with pytest.raises(TypeError, match=f"expected a floating-point parameter .*{message}"):
        afa.inject(model, target_parameters=PARAMETERS)


def test_injecting_twice_is_refused():
    with pytest.raises(ValueError, match="AFA layers already"):
        afa.inject(injected(), target_parameters=PARAMETERS)
