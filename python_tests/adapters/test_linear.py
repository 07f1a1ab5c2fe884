"""What is special to AFALinear beside the contract: its bases, the calls that really happen, its weight."""

import collections
import contextlib

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from layer_helpers import BASES, composed, trained
from torch import nn
from torch.nn.utils import parametrizations

import afa_kernels as afa

pytestmark = pytest.mark.fast


@pytest.fixture(params=BASES, ids=str)
def base(request):
    torch.manual_seed(0)
    return BASES[request.param]()


@contextlib.contextmanager
def counted():
    """Yield a Counter of the torch operators that run inside, also within library operators."""
    calls = collections.Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield calls
    names = (event.name for event in profile.events())
    calls.update(name.removeprefix("aten::") for name in names if name.startswith("aten::"))


def gemms(calls):
    return sum(calls[name] for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"))


@pytest.mark.parametrize("alpha_t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 12), (0, 12)], ids=str)
def test_forward_and_gradients_are_the_formula(base, alpha_t, shape):
    layer = trained(base.double())
    layer.set_alpha_t(alpha_t)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = composed(layer, x)
    torch.testing.assert_close(y, expected, atol=1e-7, rtol=1e-6)  # alpha_t is float32
    inputs = (x, layer.lora_a, layer.lora_b)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, dy)
    wanted = torch.autograd.grad(expected, inputs, dy)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["hook", "backward hook", "pre-hook", "parametrized", "overridden", "subclass"])
def test_a_base_that_is_not_plain_is_called(kind):
    base, seen = nn.Linear(12, 10), []
    if kind == "hook":
        base.register_forward_hook(lambda m, args, out: seen.append(out))
    elif kind == "backward hook":
        base.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0]))
    elif kind == "pre-hook":
        base.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    elif kind == "parametrized":
        parametrizations.weight_norm(base)
    elif kind == "overridden":
        base.forward = lambda x: torch.sigmoid(F.linear(x, base.weight, base.bias))
    else:

        class Squashed(nn.Linear):
            def forward(self, x):
                return torch.sigmoid(super().forward(x))

        base = Squashed(12, 10)
    layer = trained(base)
    x = torch.randn(7, 12, requires_grad=True)
    y = layer(x)
    expected = composed(layer, x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy), atol=1e-5, rtol=1e-5
    )
    if kind == "hook":
        # What a hook has seen must not change afterwards: the branch is not accumulated into it.
        torch.testing.assert_close(seen[0], F.linear(x, base.weight, base.bias))
    if kind == "backward hook":
        torch.testing.assert_close(seen[0], dy)


def test_inspecting_code_finds_weight_and_bias(base):
    layer = afa.AFALinear(base)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (12, 10)


def test_the_dtype_of_the_adapter_can_be_chosen():
    layer = afa.AFALinear(nn.Linear(12, 10), dtype=torch.bfloat16)
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.Conv2d(3, 4, 1), "Conv2d"),
        (lambda: nn.Embedding(3, 4), "Embedding"),
        (lambda: nn.LazyLinear(3), "run it once"),
        (lambda: afa.AFALinear(nn.Linear(3, 4)), "AFALinear already"),
        (lambda: nn.Linear(3, 4, dtype=torch.complex64), "complex64"),
    ],
    ids=["conv2d", "embedding", "lazy", "afa", "complex"],
)
def test_an_unsupported_base_is_named(make, named):
    with pytest.raises(TypeError, match=rf"base_layer: expected torch.nn.Linear.*{named}"):
        afa.AFALinear(make())


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"r": 0}, ValueError, "r: .*got 0"),
        ({"r": 4.0}, TypeError, "r: .*float"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha"),
        ({"activation": "swish"}, ValueError, "activation: .*silu.*'swish'"),
        ({"dropout": 1.0}, ValueError, "dropout: .*1.0"),
        ({"dropout": True}, TypeError, "dropout"),
        ({"dtype": torch.int8}, TypeError, "dtype: .*int8"),
        ({"backend": "tpu"}, ValueError, "backend"),
    ],
)
def test_wrong_arguments_are_named_and_leave_the_base_alone(options, error, named):
    base = nn.Linear(12, 10)
    with pytest.raises(error, match=named):
        afa.AFALinear(base, **options)
    assert base.weight.requires_grad


# --- the calls that really happen -----------------------------------------------------------------


def test_plan_names_the_path(base):
    layer = trained(base)
    x = torch.randn(7, 12)
    assert layer.plan(x).path == "fused"
    layer.set_alpha_t(0.0)
    assert layer.plan(x).path == "gemm"
    layer.merge()
    assert layer.plan(x).path == "merged"


ACTIVATION_CALLS = ("silu", "sigmoid", "exp", "tanh", "relu", "gelu", "erf", "where", "maximum")


def test_identity_runs_gemms_and_nothing_else(base):
    layer = trained(base)
    x = torch.randn(7, 12, requires_grad=True)
    with counted() as calls, afa.use_backend("torch"):
        layer(x).sum().backward()
    assert calls["silu"] and calls["sigmoid"], "the activation is not seen, so its absence shows nothing"

    layer.set_alpha_t(0.0)
    with counted() as calls, afa.use_backend("torch"):
        y = layer(x)
    assert gemms(calls) == 3, calls  # the frozen one, x A^T, and z B^T
    assert not any(calls[name] for name in ACTIVATION_CALLS), calls
    assert not any(calls[name] for name in ("add", "add_", "sub", "div")), calls
    with counted() as calls:
        y.sum().backward()
    assert gemms(calls) == 5, calls  # dy W, dy B, dz A, dA and dB
    assert not any(calls[name] for name in ACTIVATION_CALLS), calls


@pytest.mark.parametrize("alpha_t", [1.0, 0.0])
def test_what_is_saved_does_not_depend_on_alpha_t(alpha_t):
    layer = trained(nn.Linear(12, 10))
    layer.set_alpha_t(alpha_t)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(7, 12, requires_grad=True))
    shapes = [tuple(t.shape) for t in saved]
    assert shapes.count((7, 4)) == 1  # z
    assert (7, 10) not in shapes
    assert len([t for t in saved if t.numel() == 7 * 12]) == 1  # x itself, once


def test_a_merged_layer_runs_one_gemm(base):
    layer = trained(base)
    layer.set_alpha_t(0.0)
    layer.merge()
    x = torch.randn(7, 12)
    with counted() as frozen:
        base(x)
    with counted() as calls:
        layer(x)
    assert calls == frozen
    assert gemms(calls) == 1


def test_layers_side_by_side_by_torch_func():
    """As torch.func.stack_module_state makes them: their alpha_t is a tensor of several values then."""
    layers = [trained(nn.Linear(12, 10)) for _ in range(3)]
    for alpha_t, layer in zip((0.0, 0.25, 1.0), layers, strict=True):
        layer.set_alpha_t(alpha_t)
    x, skeleton = torch.randn(5, 12), trained(nn.Linear(12, 10)).to("meta")
    call = lambda *state: torch.func.functional_call(skeleton, state, (x,))  # noqa: E731
    ys = torch.func.vmap(call)(*torch.func.stack_module_state(layers))
    torch.testing.assert_close(ys, torch.stack([layer(x) for layer in layers]))


# --- the weight and the state


def test_a_computed_weight_is_not_merged():
    layer = trained(parametrizations.weight_norm(nn.Linear(12, 10)))
    layer.set_alpha_t(0.0)
    with pytest.raises(ValueError, match="parametrization"):
        layer.merge()


def test_an_offloaded_weight_is_not_merged():
    """accelerate leaves an empty weight on the meta device between two calls."""
    accelerate = pytest.importorskip("accelerate")
    layer = trained(nn.Linear(12, 10))
    layer.set_alpha_t(0.0)
    merged = layer.merged_weight()
    accelerate.cpu_offload(layer)
    with pytest.raises(ValueError, match="merge: accelerate has offloaded.*remove_hook_from_submodules"):
        layer.merge()
    accelerate.hooks.remove_hook_from_submodules(layer)
    layer.merge()
    assert torch.equal(layer.weight, merged)


def test_merging_ignores_autocast():
    layer = trained(nn.Linear(12, 10))
    layer.set_alpha_t(0.0)
    expected = layer.merged_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.merged_weight(), expected)


def test_alpha_survives_meta_and_to_empty():
    with torch.device("meta"):
        layer = afa.AFALinear(nn.Linear(12, 10))
    layer.set_alpha_t(0.3)
    layer = layer.to_empty(device="cpu")
    assert layer.alpha_t_buffer.item() == pytest.approx(0.3)
    assert layer.lora_a.shape == (8, 12) and layer.lora_a.device.type == "cpu"


def test_a_state_with_another_dtype_of_alpha_is_assigned_as_float32():
    layer = afa.AFALinear(nn.Linear(12, 10))
    state = layer.state_dict()
    state["alpha_t_buffer"] = torch.tensor(0.5, dtype=torch.bfloat16)
    layer.load_state_dict(state, assign=True)
    assert layer.alpha_t_buffer.dtype == torch.float32 and layer.alpha_t == 0.5
