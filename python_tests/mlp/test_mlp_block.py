"""The MLP block as one call: the numbers and the bits of its parts, what it saves, and when it steps aside."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import skip_unless_taken
from helpers import DTYPES, assert_as_accurate_as_torch
from mlp_helpers import ACTIVATIONS, INNER, MLP, K, assert_equal, pair, saved_bytes, step
from torch import func, nn
from torch.utils.checkpoint import checkpoint

import afa_kernels as afa
from afa_kernels.model import mlp as blocks
from afa_kernels.operator import mlp as operator

pytestmark = pytest.mark.fast


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls that computed a whole block."""
    calls, original = [], blocks.mlp
    monkeypatch.setattr(blocks, "mlp", lambda *of: calls.append(1) or original(*of))
    return calls


def exact(block: nn.Module, x, wanted: dict) -> dict:
    """Return what a step gives in float64, written in torch ops."""
    truth = copy.deepcopy(block).double()

    def branch(layer, x):
        z = x @ layer.lora_a.T
        return layer.base_layer(x) + layer.scaling * (z + layer.alpha_t * (F.silu(z) - z)) @ layer.lora_b.T

    def call(x):
        net = truth[0]
        return branch(net.w2, ACTIVATIONS[net.activation](branch(net.w1, x)) * branch(net.w3, x))

    result = step(truth, x.double(), call=call)
    assert result.keys() == wanted.keys()
    return result


# --- numbers


@pytest.mark.parametrize("name", [*DTYPES, "f64"])
@pytest.mark.parametrize("alpha_t", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(
    ("activation", "shape", "inner", "bias"),
    [("silu", (33, 24), 40, True), ("gelu", (2, 5, 17), 51, False), ("gelu_tanh", (1, 7), 7, True)],
)
def test_a_block_is_as_accurate_as_its_parts(name, alpha_t, activation, shape, inner, bias):
    dtype = DTYPES.get(name, torch.float64)
    of = {"dtype": dtype, "activation": activation, "bias": bias}
    parts, block = pair(shape[-1], inner, alpha_t=alpha_t, backend="torch", **of)
    x = torch.randn(shape).to(dtype)
    got, same = step(block, x), step(parts, x)
    truth = exact(block, x, got)
    for what, value in got.items():
        assert_as_accurate_as_torch(value, same[what], truth[what], what, dtype)


@pytest.mark.parametrize("name", [*DTYPES, "f64"])
@pytest.mark.parametrize("alpha_t", [0.5, 0.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_bits_are_those_of_the_parts(fused, name, alpha_t, activation):
    dtype = DTYPES.get(name, torch.float64)
    parts, block = pair(K, INNER, dtype, activation, alpha_t=alpha_t)
    for m in (1, 3, 64):
        x = torch.randn(m, K).to(dtype)
        assert_equal(step(block, x), step(parts, x))
    assert len(fused) == 3


def test_every_backend_runs_it(backend, device, fused):
    skip_unless_taken(backend, torch.float16)
    parts, block = pair(16, 24, torch.float16, backend=backend)
    x = torch.randn(6, 16).to(device, torch.float16)
    got, want = step(block.to(device), x), step(parts.to(device), x)
    assert fused
    assert_equal(got, want)


def test_a_row_does_not_depend_on_the_others():
    """As far as the rows of the parts do not: torch multiplies the frozen weights."""
    parts, block = pair(dtype=torch.float64)
    x = torch.randn(64, K, dtype=torch.float64)
    others = torch.cat([x[:8], torch.randn(56, K, dtype=torch.float64)])
    for model in (parts, block):
        assert torch.equal(model(x)[:8], model(others)[:8])
    dy = torch.randn(64, K, dtype=torch.float64)
    one, two = step(block, x, dy)["dx"], step(block, others, torch.cat([dy[:8], dy[8:].flip(0)]))["dx"]
    assert torch.equal(one[:8], two[:8])


def test_gradients_are_derivatives_and_can_be_differentiated():
    for activation in ACTIVATIONS:
        _, block = pair(4, 5, torch.float64, activation, r=2)
        leaves = [p for p in block.parameters() if p.requires_grad]
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            check(lambda x, *_: block(x), (x, *leaves), fast_mode=True)  # noqa: B023


def test_gradients_in_a_batch_and_transforms(fused):
    parts, block = pair(dtype=torch.float64)
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    dys = torch.randn(3, 5, K, dtype=torch.float64)
    got, want = (torch.autograd.grad(m(x), x, dys, is_grads_batched=True)[0] for m in (block, parts))
    torch.testing.assert_close(got, want)
    assert len(fused) == 1
    for transform in (lambda f: func.vmap(f)(x), lambda f: func.jvp(f, (x,), (x.cos(),))):
        torch.testing.assert_close(transform(block), transform(parts))


@pytest.mark.parametrize("needed", ["x", "w1.lora_a", "w3.lora_b", "w2.lora_a", "w2.lora_b", "w1.lora_b w2.lora_a"])
def test_only_what_needs_a_gradient_gets_one(needed):
    parts, block = pair()
    results = []
    for model in (parts, block):
        for name, p in model.named_parameters():
            p.requires_grad_(name.removeprefix("0.") in needed.split())
        torch.manual_seed(0)
        x = torch.randn(5, K, requires_grad=needed == "x")
        model(x).square().sum().backward()
        of = {"dx": x.grad} | {name: p.grad for name, p in model.named_parameters()}
        results.append({name: grad for name, grad in of.items() if grad is not None})
    assert len(results[1]) == len(needed.split())
    assert_equal(results[1], results[0])


def test_what_is_passed_is_only_read():
    _, block = pair()
    x = torch.randn(5, K, requires_grad=True)
    y = block(x)
    dy, saved = torch.randn(5, K), [t for t in y.grad_fn.saved_tensors if t is not None]
    before = [t.detach().clone() for t in (dy, *saved)]
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, (dy, *saved)))


def test_expanded_gradients_no_rows_and_autocast(fused):
    parts, block = pair()
    assert step(block, torch.randn(0, K))["dx"].shape == (0, K)
    x = torch.randn(4, K)
    assert_equal(step(block, x, torch.ones(1, 1).expand(4, K)), step(parts, x, torch.ones(1, 1).expand(4, K)))
    with torch.autocast("cpu", torch.bfloat16):
        got = step(block, x)
        assert got["y"].dtype == torch.bfloat16
        assert_equal(got, step(parts, x))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(block(x), parts(x))
    assert len(fused) == 5


# --- what is saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes(dtype):
    """x and the outputs of gate and up, as Unsloth's LoRA_MLP, and z, which that multiplies again; with the ratio of
    Llama-3-8B's sizes at least 40% below PEFT's."""
    m, k, inner, r = 64, 32, 112, 2
    parts, block = pair(k, inner, dtype, r=r)
    x = torch.randn(m, k).to(dtype).requires_grad_()
    got = saved_bytes(block, x)
    assert got == (m * k + 2 * m * inner + 3 * m * r) * dtype.itemsize
    assert saved_bytes(parts, x) == got + 2 * m * inner * dtype.itemsize  # act(gate) and the product
    peft = pytest.importorskip("peft")
    for cast in (True, False):
        config = peft.LoraConfig(r=r, target_modules=["w1", "w2", "w3"])
        torch.manual_seed(0)
        stock = peft.get_peft_model(nn.Sequential(MLP(k, inner, dtype)), config, autocast_adapter_dtype=cast)
        assert got <= 0.6 * saved_bytes(stock, x), cast


# --- beside other things


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(fused, reentrant):
    parts, block = pair()
    x = torch.randn(5, K)
    assert_equal(step(block, x, call=lambda x: checkpoint(block, x, use_reentrant=reentrant)), step(parts, x))
    assert len(fused) == 2


def test_compiled():
    torch._dynamo.reset()
    parts, block = pair()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for alpha_t in (0.5, 0.3):
        for model in (parts, block):
            afa.set_alpha_t(model, alpha_t)
        x = torch.randn(5, K)
        got, want = step(block, x, call=compiled), step(parts, x)
        for what, value in got.items():
            torch.testing.assert_close(value, want[what], msg=what)
    assert counter.frame_count == 1
    assert sum("linear_forward" in str(node.target) for node in counter.graphs[0].graph.nodes) <= 1


def test_copies_pickles_and_files(fused):
    parts, block = pair()
    x, stream = torch.randn(5, K), io.BytesIO()
    assert list(block.state_dict()) == list(parts.state_dict()) and str(block) == str(parts)
    torch.save(block, stream)
    stream.seek(0)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(stream, weights_only=False)):
        with torch.no_grad():
            other[0].w2.lora_b.zero_()
        fused.clear()
        assert not torch.equal(other(x), parts(x)) and fused
    assert torch.equal(block(x), parts(x))


def hook_before(block):
    block[0].w3.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))


def hook_behind(block):
    block[0].w1.register_forward_hook(lambda _m, _args, y: y + 1)


def hook_of_the_base(block):
    block[0].w2.base_layer.register_forward_hook(lambda _m, _args, y: y * 2)


def a_base_that_trains(block):
    block[0].w1.base_layer.weight.requires_grad_()


def other_backend(block):
    block[0].w3.backend = "torch"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_before, "w3 has hooks or a forward of its own"),
        (hook_behind, "w1 has hooks or a forward of its own"),
        (hook_of_the_base, "w2 is sharded, or its base layer or its adapters have to be called"),
        (a_base_that_trains, "a base layer trains"),
        (other_backend, "their backends differ"),
    ],
)
def test_a_block_steps_aside_and_says_why(fused, monkeypatch, change, reason):
    monkeypatch.setattr(blocks, "_told", set())
    parts, block = pair()
    x = torch.randn(5, K)
    assert afa.plan_mlp(block[0], x).path == "block" and afa.plan_mlp(parts[0], x).path == "parts"
    for model in (parts, block):
        change(model)
    with pytest.warns(UserWarning, match=f"runs as its parts: {reason}") as told:
        assert_equal(step(block, x), step(parts, x))
        step(block, x)
    assert len(told) == 1 and not fused
    assert afa.plan_mlp(block[0], x) == afa.Plan("torch", "parts", reason)


@pytest.mark.filterwarnings("ignore:fuse_mlp. an MLP block runs as its parts")
def test_dropout_and_other_dtypes_step_aside(fused):
    parts, block = pair(dropout=0.25)
    x = torch.randn(5, K)
    torch.manual_seed(3)
    want = step(parts.train(), x)
    torch.manual_seed(3)
    assert_equal(step(block.train(), x), want)
    assert not fused and "dropout" in afa.plan_mlp(block[0], x).reason
    assert torch.equal(block.eval()(x), parts.eval()(x)) and fused
    block[0].w1.dropout = block[0].w3.dropout = 0.0
    assert "dropout" in afa.plan_mlp(block.train()[0], x).reason
    errors = []
    for model in (parts, block):
        with pytest.raises(TypeError) as error:
            model(x.double())
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_merging_and_unloading(fused):
    parts, block = pair(dtype=torch.float64, alpha_t=0.0)
    x = torch.randn(5, K, dtype=torch.float64)
    want = block(x)
    merged = afa.merge(block)(x)
    torch.testing.assert_close(merged, want)
    assert torch.equal(merged, afa.merge(parts)(x)) and len(fused) == 1
    assert afa.plan_mlp(block[0], x).reason == "a layer is merged or disabled"
    afa.unmerge(block)
    block(x)
    assert len(fused) == 2
    afa.unload(afa.merge(block))
    assert type(block[0]) is MLP and torch.equal(block(x), merged)


def test_a_block_without_one_of_its_layers_is_none_any_more():
    parts, block = pair()
    for model in (parts, block):
        model[0].w2 = model[0].w2.base_layer
    x = torch.randn(5, K)
    assert afa.plan_mlp(block[0], x).reason == "w2 is no adapted layer any more"
    assert_equal(step(block, x), step(parts, x))
    assert type(block[0]) is MLP


def test_unfuse_gives_the_module_its_class_back(fused):
    _, block = pair()
    with pytest.raises(ValueError, match="model: it has AFA layers already"):
        afa.inject(block, fuse_mlp=True)
    assert afa.unfuse_mlp(block) is block and type(block[0]) is MLP
    block(torch.randn(5, K))
    assert not fused
    afa.fuse_mlp(block)(torch.randn(5, K))
    assert fused and isinstance(block[0], MLP)


# --- what is a block


class UpFirst(MLP):
    """Its names and the order of its calls say the contrary of what its layers are."""

    def forward(self, x):
        up = self.w1(x)
        return self.w2(up * ACTIVATIONS[self.activation](self.w3(x)))


class Relu(MLP):
    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)) * self.w3(x))


class Drops(MLP):
    def forward(self, x):
        return self.w2(F.dropout(F.silu(self.w1(x)) * self.w3(x), 0.1, self.training))


class Residual(MLP):
    def forward(self, x):
        return x + super().forward(x)


class Twice(MLP):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(2 * x))


class TwoArguments(MLP):
    def forward(self, x, residual):
        return residual + super().forward(x)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Relu, "it computes no act"),
        (Drops, "it computes no act"),
        (Residual, "return what that gives"),
        (Twice, "its forward does not call two layers with x"),
        (TwoArguments, "its forward does not take x alone: TypeError"),
    ],
)
def test_what_computes_something_else_is_left_alone(net, reason):
    model = nn.Sequential(net()).eval()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"fuse_mlp: nothing to fuse in Sequential: 0: .*{reason}"):
        afa.inject(model, fuse_mlp=True)
    assert type(model[0]) is net and type(model[0].w1) is nn.Linear and not model[0].training
    assert torch.equal(torch.get_rng_state(), state)
    both = afa.inject(nn.Sequential(net()))
    both.append(pair()[0][0])
    with pytest.warns(UserWarning, match=f"left alone, the first module for each reason: 0: .*{reason}"):
        afa.fuse_mlp(both)
    assert type(both[0]) is net and type(both[1]) is not MLP
    assert reason in afa.plan_mlp(both[0], torch.randn(2, K)).reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_activation_are_found_by_value(fused, dtype, activation):
    parts, block = pair(K, INNER, dtype, activation, net=UpFirst)
    assert block[0]._afa_mlp == ("w3", "w1", "w2", activation, None, type(None))
    x = torch.randn(3, K).to(dtype)
    assert torch.equal(block(x), parts(x)) and fused
    assert set(operator.GATES) == set(ACTIVATIONS)


def test_only_adapted_layers_are_fused():
    for options, match in (
        ({"target_modules": ["w1", "w2"]}, "w3 is not adapted"),
        ({"adapters": {"one": {}}}, "stack"),
    ):
        with pytest.raises(ValueError, match=f"fuse_mlp: .*{match}"):
            afa.inject(nn.Sequential(MLP()), fuse_mlp=True, **options)
