"""The MLP block as one call: the numbers and the bits of its parts, what it saves, and when it steps aside."""

import copy
import io

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import skip_unless_taken
from helpers import DTYPES, assert_as_accurate_as_torch
from mlp_helpers import ACTIVATIONS, INNER, MLP, K, assert_equal, fused, pair, step  # noqa: F401
from torch import func, nn
from torch.utils.checkpoint import checkpoint

import afa_kernels as afa
from bench import memory

pytestmark = pytest.mark.fast
ALL_DTYPES = {**DTYPES, "f64": torch.float64}


@pytest.mark.parametrize("dtype", ALL_DTYPES.values(), ids=ALL_DTYPES)
@pytest.mark.parametrize("alpha_t", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(
    ("activation", "shape", "inner", "bias"),
    [("silu", (33, 24), 40, True), ("gelu", (2, 5, 17), 51, False), ("gelu_tanh", (1, 7), 7, True)],
)
def test_a_block_is_as_accurate_as_its_parts(dtype, alpha_t, activation, shape, inner, bias):
    of = {"dtype": dtype, "activation": activation, "bias": bias}
    parts, block = pair(shape[-1], inner, alpha_t=alpha_t, options={"backend": "torch"}, **of)
    truth = copy.deepcopy(parts).double()

    def branch(layer, x):
        z = x @ layer.lora_a.T
        return layer.base_layer(x) + layer.scaling * (z + alpha_t * (F.silu(z) - z)) @ layer.lora_b.T

    def in_torch(x):
        return branch(truth[0].w2, ACTIVATIONS[activation](branch(truth[0].w1, x)) * branch(truth[0].w3, x))

    x = torch.randn(shape).to(dtype)
    got, same, exact = step(block, x), step(parts, x), step(truth, x.double(), call=in_torch)
    assert len(got) == 8
    for what, value in got.items():
        assert_as_accurate_as_torch(value, same[what], exact[what], what, dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES.values(), ids=ALL_DTYPES)
@pytest.mark.parametrize("alpha_t", [0.5, 0.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_bits_are_those_of_the_parts(fused, dtype, alpha_t, activation):  # noqa: F811
    parts, block = pair(K, INNER, dtype, activation, alpha_t=alpha_t)
    for m in (1, 3, 64):
        x = torch.randn(m, K).to(dtype)
        assert_equal(step(block, x), step(parts, x))
    assert len(fused) == 3


def test_every_backend_runs_it(backend, device, fused):  # noqa: F811
    skip_unless_taken(backend, torch.float16)
    parts, block = pair(16, 24, torch.float16, options={"backend": backend})
    x = torch.randn(6, 16).to(device, torch.float16)
    assert_equal(step(block.to(device), x), step(parts.to(device), x))
    assert fused


def test_a_row_does_not_depend_on_the_others():
    _, block = pair(dtype=torch.float64)
    x, dy = torch.randn(2, 64, K, dtype=torch.float64)
    others, other_dy = (torch.cat([t[:8], torch.randn_like(t[8:])]) for t in (x, dy))
    one, other = step(block, x, dy), step(block, others, other_dy)
    assert torch.equal(one["y"][:8], other["y"][:8]) and torch.equal(one["dx"][:8], other["dx"][:8])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_derivatives_and_can_be_differentiated(activation):
    _, block = pair(4, 5, torch.float64, activation, options={"r": 2})
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), *block.parameters()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        check(lambda x, *_: block(x), [t for t in inputs if t.requires_grad], fast_mode=True)


@pytest.mark.filterwarnings("ignore:fuse_mlp")
def test_gradients_in_a_batch_and_transforms(fused):  # noqa: F811
    parts, block = pair(dtype=torch.float64)
    x, *dys = torch.randn(4, 5, K, dtype=torch.float64)
    x.requires_grad_()
    got, want = (torch.autograd.grad(m(x), x, torch.stack(dys), is_grads_batched=True)[0] for m in (block, parts))
    torch.testing.assert_close(got, want)
    assert len(fused) == 1
    for transform in (lambda f: func.vmap(f)(x), lambda f: func.jvp(f, (x,), (x.cos(),))):
        torch.testing.assert_close(transform(block), transform(parts))


@pytest.mark.parametrize("needed", ["x", "w1.lora_a", "w3.lora_b", "w2.lora_a", "w2.lora_b", "w1.lora_b w2.lora_a"])
def test_only_what_needs_a_gradient_gets_one(needed):
    results = []
    for model in pair():
        for name, p in model.named_parameters():
            p.requires_grad_(name.removeprefix("0.") in needed.split())
        x = torch.linspace(-2, 2, 5 * K).view(5, K).requires_grad_(needed == "x")
        model(x).square().sum().backward()
        of = {"dx": x.grad} | {name: p.grad for name, p in model.named_parameters()}
        results.append({name: grad for name, grad in of.items() if grad is not None})
    assert len(results[1]) == len(needed.split())
    assert_equal(results[1], results[0])


def test_what_is_passed_and_saved_is_only_read():
    _, block = pair()
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, K)
    y = block(x)
    tensors = [dy, *(t for t in y.grad_fn.saved_tensors if t is not None)]
    before = [t.detach().clone() for t in tensors]
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and all(map(torch.equal, before, tensors))


def test_expanded_gradients_no_rows_and_modes(fused):  # noqa: F811
    parts, block = pair()
    assert step(block, torch.randn(0, K))["dx"].shape == (0, K)
    x, dy = torch.randn(4, K), torch.ones(1, 1).expand(4, K)
    assert_equal(step(block, x, dy), step(parts, x, dy))
    with torch.autocast("cpu", torch.bfloat16):
        got = step(block, x)
        assert got["y"].dtype == torch.bfloat16
        assert_equal(got, step(parts, x))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(block(x), parts(x))
    assert len(fused) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes(dtype):
    """x and the outputs of gate and up, as Unsloth's LoRA_MLP, and z, which that multiplies again; with the ratio of
    Llama-3-8B's sizes at least 40% below PEFT's."""

    def kept(model, x):
        return memory.saved_bytes(lambda: model(x), (*model.parameters(), *model.buffers()))

    m, k, inner, r = 64, 32, 112, 2
    parts, block = pair(k, inner, dtype, options={"r": r})
    x = torch.randn(m, k).to(dtype).requires_grad_()
    got = kept(block, x)
    assert got == (m * k + 2 * m * inner + 3 * m * r) * dtype.itemsize
    assert kept(parts, x) == got + 2 * m * inner * dtype.itemsize  # act(gate) and the product
    peft = pytest.importorskip("peft")
    for cast in (True, False):
        config = peft.LoraConfig(r=r, target_modules=["w1", "w2", "w3"])
        stock = peft.get_peft_model(nn.Sequential(MLP(k, inner, dtype)), config, autocast_adapter_dtype=cast)
        assert got <= 0.6 * kept(stock, x), cast


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(fused, reentrant):  # noqa: F811
    parts, block = pair()
    x = torch.randn(5, K)
    assert_equal(step(block, x, call=lambda x: checkpoint(block, x, use_reentrant=reentrant)), step(parts, x))
    assert len(fused) == 2


def test_compiled():
    torch._dynamo.reset()
    parts, block = pair(dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for alpha_t in (0.5, 0.3):
        for model in (parts, block):
            afa.set_alpha_t(model, alpha_t)
        x = torch.randn(5, K, dtype=torch.float64)
        torch.testing.assert_close(step(block, x, call=compiled), step(parts, x))
    assert counter.frame_count == 1


def test_copies_and_pickles_are_blocks_of_their_own(fused):  # noqa: F811
    parts, block = pair()
    x, stream = torch.randn(5, K), io.BytesIO()
    assert list(block.state_dict()) == list(parts.state_dict()) and str(block) == str(parts)
    torch.save(block, stream)
    stream.seek(0)
    for other in (copy.deepcopy(block), torch.load(stream, weights_only=False)):
        with torch.no_grad():
            other[0].w2.lora_b.zero_()
        fused.clear()
        assert not torch.equal(other(x), parts(x)) and fused
    assert torch.equal(block(x), parts(x))


# --- when a block runs as its parts

CHANGES = [
    (lambda m: m.w3.register_forward_pre_hook(lambda _, args: (args[0] * 2,)), "w3 has hooks or a forward of its own"),
    (lambda m: m.w1.register_forward_hook(lambda _, args, y: y + 1), "w1 has hooks or a forward of its own"),
    (lambda m: m.w2.base_layer.register_forward_hook(lambda _, args, y: y * 2), "w2 is sharded, or its base layer or"),
    (lambda m: m.w1.base_layer.weight.requires_grad_(), "a base layer trains"),
    (lambda m: m.w2.base_layer.bias.requires_grad_(), "a base layer trains"),
    (lambda m: setattr(m.w3, "backend", "torch"), "their backends differ"),
    (lambda m: m.w1.train(), None),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[reason for _, reason in CHANGES])
def test_a_block_steps_aside_and_says_why(fused, change, reason):  # noqa: F811
    parts, block = pair()
    x = torch.randn(5, K)
    assert afa.plan_mlp(block[0], x).path == "block" and afa.plan_mlp(parts[0], x).path == "parts"
    for model in (parts, block):
        change(model[0])
    if reason is None:
        assert_equal(step(block, x), step(parts, x))
        assert fused
        return
    with pytest.warns(UserWarning, match=f"runs as its parts: {reason}") as told:
        assert_equal(step(block, x), step(parts, x))
        step(block, x)
    assert len(told) == 1 and not fused
    plan = afa.plan_mlp(block[0], x)
    assert plan.path == "parts" and plan.reason.startswith(reason)


@pytest.mark.filterwarnings("ignore:fuse_mlp")
@pytest.mark.parametrize("dropping", [("w1", "w2", "w3"), ("w2",)])
def test_dropout_runs_the_parts_in_training(fused, dropping):  # noqa: F811
    results, x = [], torch.randn(5, K)
    parts, block = pair()
    for model in (parts, block):
        for name in dropping:
            getattr(model[0], name).dropout = 0.25
    for model in (parts, block):
        torch.manual_seed(3)
        results.append(step(model.train(), x))
    assert_equal(results[1], results[0])
    assert not fused and "dropout draws one mask for each layer" in afa.plan_mlp(block[0], x).reason
    assert torch.equal(block.eval()(x), parts.eval()(x)) and fused


def test_merging_unloading_and_unfusing(fused):  # noqa: F811
    parts, block = pair(dtype=torch.float64, alpha_t=0.0)
    x = torch.randn(5, K, dtype=torch.float64)
    want = block(x)
    merged = afa.merge(block)(x)
    torch.testing.assert_close(merged, want)
    assert torch.equal(merged, afa.merge(parts)(x)) and len(fused) == 1
    assert afa.plan_mlp(block[0], x).reason == "a layer is merged or disabled"
    afa.unmerge(block)(x)
    assert len(fused) == 2
    assert type(afa.unfuse_mlp(block)[0]) is MLP and type(afa.fuse_mlp(block)[0]) is not MLP
    afa.unload(afa.merge(block))
    torch.testing.assert_close(block(x), merged)
    assert type(block[0]) is MLP


def test_a_block_without_one_of_its_layers_is_none_any_more():
    parts, block = pair()
    for model in (parts, block):
        model[0].w2 = model[0].w2.base_layer
    x = torch.randn(5, K)
    assert afa.plan_mlp(block[0], x).reason == "w2 is no adapted layer any more"
    assert_equal(step(block, x), step(parts, x))
    assert type(block[0]) is MLP


# --- what is a block


def mlp_with(forward) -> type:
    return type("Other", (MLP,), {"forward": forward})


OTHERS = [
    (lambda m, x: m.w2(torch.relu(m.w1(x)) * m.w3(x)), "it computes no act"),
    (lambda m, x: m.w2(F.dropout(F.silu(m.w1(x)) * m.w3(x), 0.1, m.training)), "it computes no act"),
    (lambda m, x: x + MLP.forward(m, x), "its forward does not call .* and return what that gives"),
    (lambda m, x: m.w2(F.silu(m.w1(x)) * m.w3(2 * x)), "its forward does not call two layers with x"),
    (lambda m, x, residual: residual + MLP.forward(m, x), "its forward does not take x alone: TypeError"),
]


@pytest.mark.parametrize(("forward", "reason"), OTHERS, ids=range(len(OTHERS)))
def test_what_computes_something_else_is_left_alone(forward, reason):
    model, state = nn.Sequential(mlp_with(forward)()).eval(), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"fuse_mlp: nothing to fuse in Sequential: 0: {reason}"):
        afa.inject(model, fuse_mlp=True)
    assert type(model[0].w1) is nn.Linear and not model[0].training and not model[0].w1._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    both = nn.Sequential(*afa.inject(model), *pair()[0])
    with pytest.warns(UserWarning, match=f"left alone, the first module for each reason: 0: {reason}"):
        afa.fuse_mlp(both)
    assert [hasattr(module, "_afa_mlp") for module in both] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_activation_are_found_by_value(fused, dtype, activation):  # noqa: F811
    """Where the names and the order of the calls say the contrary, and K is I."""
    net = mlp_with(lambda m, x: m.w1(m.w2(x) * ACTIVATIONS[activation](m.w3(x))))
    parts, block = pair(K, K, dtype, net=net)
    assert block[0]._afa_mlp == ("w3", "w2", "w1", activation, None, type(None))
    x = torch.randn(3, K).to(dtype)
    assert torch.equal(block(x), parts(x)) and fused == [activation]


def test_only_adapted_layers_are_fused():
    for options, match in (
        ({"target_modules": ["w1", "w2"]}, "w3 is not adapted"),
        ({"adapters": {"one": {}}}, "stack"),
    ):
        with pytest.raises(ValueError, match=f"fuse_mlp: .*{match}"):
            afa.inject(nn.Sequential(MLP()), fuse_mlp=True, **options)
