"""Groups of layers on one x: the numbers of separate layers, one pass over x, and every case in
which they must run apart."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch._dynamo.testing
from helpers import DTYPES, assert_as_accurate_as_torch, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import afa_kernels as afa
from afa_kernels import group as grouping
from afa_kernels import peft_format as fmt

K = 24
# (out_features, r, lora_alpha, activation, alpha_t): everything that may differ between members
MEMBERS = ((32, 4, 8, "silu", 0.7), (16, 3, 3, "gelu", 0.3), (24, 8, 4, "relu", 0.0))


def layer(n, r=4, lora_alpha=8, activation="silu", alpha_t=0.7, dtype=torch.float32, **options):
    made = afa.AFALinear(nn.Linear(K, n, dtype=dtype), r, lora_alpha, activation, **options)
    nn.init.normal_(made.lora_b, std=r**-0.5)
    made.set_alpha_t(alpha_t)
    return made


def members(dtype=torch.float32, **options) -> list[afa.AFALinear]:
    return [layer(*row, dtype=dtype, **options) for row in MEMBERS]


class Block(nn.Module):
    """A block that calls its projections one by one, as attention code does."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = members(dtype, **options)

    def forward(self, x, between=None, context=None):
        q = self.q_proj(x)
        if between is not None:
            between(x)
        other = x if context is None else context
        return q, self.k_proj(other), self.v_proj(other)


def run(function, layers, x, dys, alone=()):
    x = x.detach().clone().requires_grad_()
    for member in layers:
        member.zero_grad()
    ys = function(x)
    torch.autograd.backward([y for i, y in enumerate(ys) if i not in alone],
                            [dy for i, dy in enumerate(dys) if i not in alone])  # fmt: skip
    grads = {"dx": x.grad}
    for i, member in enumerate(layers):
        grads |= {f"da{i}": member.lora_a.grad, f"db{i}": member.lora_b.grad}
    return {f"y{i}": y.detach() for i, y in enumerate(ys)}, grads


def separate(layers):
    return lambda x: [member(x) for member in layers]


def skip_unless_taken(backend, layers, x):
    """Skip where the backend refuses one of the layers, with its reason."""
    for member in layers:
        try:
            afa.plan(x, member.lora_a, member.lora_b, 0.5, backend=backend)
        except afa.BackendUnavailable as error:
            pytest.skip(str(error))


# --- the same numbers


@pytest.mark.parametrize("shape", [(33, K), (2, 17, K)], ids=["2d", "3d"])
@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize("save", ["z", "nothing"])
def test_a_group_computes_what_its_layers_compute(backend, device, name, shape, save):
    dtype = DTYPES[name]
    layers = [m.to(device) for m in members(dtype, backend=backend, save=save)]
    x = torch.randn(shape, device=device, dtype=dtype)
    skip_unless_taken(backend, layers, x)
    dys = [torch.randn(*shape[:-1], m.out_features, device=device, dtype=dtype) for m in layers]
    apart = members(dtype, backend="torch")
    truth = members(torch.float64, backend="reference")
    for others in (apart, truth):
        for other, member in zip(others, layers, strict=True):
            other.to(device).load_state_dict(member.state_dict())
    group = afa.AFALinearGroup(layers)
    assert grouping.why_separate(layers, x) is None
    got = run(group, layers, x, dys)
    same = run(separate(apart), apart, x, dys)
    exact = run(separate(truth), truth, x.double(), [dy.double() for dy in dys])
    for g, s, e in zip(got, same, exact, strict=True):
        assert g.keys() == e.keys()
        for what in g:
            assert_as_accurate_as_torch(g[what], s[what], e[what], what, dtype)


def test_one_row(backend, device):
    layers = [m.to(device) for m in members(backend=backend)]
    x = torch.randn(1, K, device=device)
    skip_unless_taken(backend, layers, x)
    dys = [torch.randn(1, m.out_features, device=device) for m in layers]
    got, want = run(afa.AFALinearGroup(layers), layers, x, dys), run(separate(layers), layers, x, dys)
    for g, w in zip(got, want, strict=True):
        for what in g:
            torch.testing.assert_close(g[what], w[what])


def test_where_sums_are_exact_the_bits_are_equal():
    """Stacking reorders sums and changes nothing else: with small integers every sum is exact."""
    layers = [layer(n, r, r, "relu", 1.0) for n, r in ((8, 4), (16, 2), (4, 8))]
    with torch.no_grad():
        for p in (p for m in layers for p in m.parameters()):
            p.copy_(torch.randint(-3, 4, p.shape))
    x = torch.randint(-3, 4, (6, K)).float()
    dys = [torch.randint(-3, 4, (6, m.out_features)).float() for m in layers]
    got = run(afa.AFALinearGroup(layers), layers, x, dys)
    want = run(separate(layers), layers, x, dys)
    for g, w in zip(got, want, strict=True):
        for what in g:
            assert torch.equal(g[what], w[what]), what


def test_gradients_of_a_group_are_its_derivatives():
    layers = [layer(n, 2, dtype=torch.float64, activation=act) for n, act in ((3, "silu"), (4, "gelu"))]
    group = afa.AFALinearGroup(layers)
    leaves = [p for m in layers for p in (m.lora_a, m.lora_b)]
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def function(x, *_parameters):
        return group(x)

    torch.autograd.gradcheck(function, (x, *leaves), fast_mode=True)
    torch.autograd.gradgradcheck(function, (x, *leaves), fast_mode=True)


def test_gradients_that_are_differentiated_again_are_the_same():
    layers = members()
    x = torch.randn(5, K, requires_grad=True)
    leaves = [x, *(p for m in layers for p in (m.lora_a, m.lora_b))]
    y = sum(y.square().sum() for y in afa.AFALinearGroup(layers)(x))
    once = torch.autograd.grad(y, leaves, retain_graph=True)
    twice = torch.autograd.grad(y, leaves, create_graph=True)
    for got, want in zip(twice, once, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("alpha_t", [0.0, 0.5])
def test_identity_saves_no_z(alpha_t):
    layers = [layer(n, 5, alpha_t=alpha_t) for n in (32, 16)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        afa.AFALinearGroup(layers)(torch.randn(6, K))
    assert ((6, 10) in saved) == (alpha_t != 0.0)


@pytest.mark.parametrize("alone", [(0,), (1, 2), (0, 1)])
def test_outputs_that_nobody_differentiates(alone):
    layers = members()
    x = torch.randn(5, K)
    dys = [torch.randn(5, m.out_features) for m in layers]
    _, got = run(afa.AFALinearGroup(layers), layers, x, dys, alone)
    _, want = run(separate(layers), layers, x, dys, alone)
    for what in want:
        assert (got[what] is None) == (want[what] is None), what
        if want[what] is not None:
            torch.testing.assert_close(got[what], want[what])


def test_only_what_needs_a_gradient_gets_one():
    layers = members()
    layers[0].lora_a.requires_grad_(False)
    layers[1].lora_b.requires_grad_(False)
    x = torch.randn(5, K)
    sum(y.sum() for y in afa.AFALinearGroup(layers)(x)).backward()
    grads = [(m.lora_a.grad is not None, m.lora_b.grad is not None) for m in layers]
    assert grads == [(False, True), (True, False), (True, True)]


def test_backward_twice_gives_the_same():
    layers = members()
    x = torch.randn(5, K, requires_grad=True)
    y = sum(y.square().sum() for y in afa.AFALinearGroup(layers)(x))
    first = torch.autograd.grad(y, [x, layers[0].lora_a], retain_graph=True)
    second = torch.autograd.grad(y, [x, layers[0].lora_a])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_outputs_may_be_changed_in_place():
    layers = members()
    x = torch.randn(2, 5, K)
    dys = [torch.randn(2, 5, m.out_features) for m in layers]
    group = afa.AFALinearGroup(layers)
    _, got = run(lambda x: [y.mul_(2) for y in group(x)], layers, x, dys)
    _, want = run(lambda x: [m(x) * 2 for m in layers], layers, x, dys)
    for what in want:
        torch.testing.assert_close(got[what], want[what])


def test_no_rows():
    layers = members()
    x = torch.randn(0, K, requires_grad=True)
    ys = afa.AFALinearGroup(layers)(x)
    assert [y.shape for y in ys] == [(0, m.out_features) for m in layers]
    sum(y.sum() for y in ys).backward()
    assert x.grad.shape == (0, K) and not layers[0].lora_a.grad.any()


def test_ranks_beyond_the_limit_of_a_backend_when_stacked():
    layers = [layer(8, 200), layer(8, 200)]
    x = torch.randn(3, K)
    for y, m in zip(afa.AFALinearGroup(layers)(x), layers, strict=True):
        torch.testing.assert_close(y, m(x))


def test_adapters_of_different_dtypes_keep_theirs():
    layers = [layer(8, dtype=torch.bfloat16), layer(8, dtype=torch.bfloat16)]
    layers[1].to(torch.bfloat16)
    sum(y.float().sum() for y in afa.AFALinearGroup(layers)(torch.randn(4, K).bfloat16())).backward()
    assert [m.lora_a.grad.dtype for m in layers] == [torch.float32, torch.bfloat16]


def test_autocast():
    layers = members()
    x = torch.randn(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = afa.AFALinearGroup(layers)(x), separate(layers)(x)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)


# --- one pass over x


def test_a_group_reads_x_once_in_each_direction():
    layers = [layer(n, backend="torch") for n in (32, 16, 16)]
    x = torch.randn(6, K, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = afa.AFALinearGroup(layers)(x)
    assert sum(t.shape == x.shape for t in saved) == 1
    assert len({y.grad_fn for y in ys}) == 1  # one node: its backward sees all gradients at once


@pytest.mark.parametrize("save_z", [True, False])
def test_the_stacked_matrices_are_one_call_of_the_backend(monkeypatch, save_z):
    from afa_kernels.backend import registry, torch_ops

    seen = []

    def recorded(function, direction):
        def call(*args, **kwargs):
            x = args[0] if direction == "forward" else args[1]
            seen.append((direction, x.shape[1]))
            return function(*args, **kwargs)

        return call

    spy = registry.Backend(
        "spy", frozenset(), torch_ops.BACKEND.status, torch_ops.BACKEND.refuses,
        recorded(torch_ops.forward, "forward"), recorded(torch_ops.backward, "backward"),
        automatic=False,
    )  # fmt: skip
    monkeypatch.setitem(registry._BACKENDS, "spy", spy)
    registry.forget_choices()
    layers = [layer(n, r=5, backend="spy", save="z" if save_z else "nothing") for n in (32, 16)]
    x = torch.randn(6, K, requires_grad=True)
    ys = afa.AFALinearGroup(layers)(x)
    assert seen == [("forward", K), ("forward", 5), ("forward", 5)]
    seen.clear()
    sum(y.sum() for y in ys).backward()
    again = [] if save_z else [("forward", K)]
    assert seen == again + [("backward", 5), ("backward", 5), ("backward", K)]
    registry.forget_choices()


# --- explicit groups: what is refused


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: [layer(8)], ValueError, "two or more different layers, got 1"),
        (lambda: [layer(8)] * 2, ValueError, "two or more different layers"),
        (lambda: [layer(8), nn.Linear(K, 8)], TypeError, "AFALinear layers, got a Linear"),
        (
            lambda: [layer(8), afa.AFALinear(nn.Linear(12, 8))],
            ValueError,
            r"same in_features, got \[24, 12\]",
        ),
    ],
)
def test_what_is_no_group_is_named(make, error, match):
    with pytest.raises(error, match=match):
        afa.AFALinearGroup(make())


SEPARATE = {
    "merged": lambda m: (m.set_alpha_t(0.0), m.merge()),
    "dropout": lambda m: setattr(m, "dropout", 0.5),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "hook of the base": lambda m: m.base_layer.register_forward_hook(lambda *_: None),
    "own forward": lambda m: setattr(m, "forward", m.forward),
    "save": lambda m: setattr(m, "save", "nothing"),
    "backend": lambda m: setattr(m, "backend", "reference"),
    "trained base": lambda m: m.base_layer.weight.requires_grad_(),
}


@pytest.mark.parametrize("obstacle", SEPARATE)
def test_members_that_cannot_share_run_one_by_one(obstacle):
    layers = members()
    SEPARATE[obstacle](layers[1])
    x = torch.randn(5, K, requires_grad=True)
    assert grouping.why_separate(layers, x)
    torch.manual_seed(0)
    got = afa.AFALinearGroup(layers)(x)
    torch.manual_seed(0)
    for g, w in zip(got, separate(layers)(x), strict=True):
        assert torch.equal(g, w)


def test_an_input_that_does_not_fit_gets_the_error_of_the_layer():
    with pytest.raises(ValueError, match="lora_a: expected shape"):
        afa.AFALinearGroup(members())(torch.randn(3, K + 1))
    with pytest.raises(TypeError, match="dtype of x"):
        afa.AFALinearGroup(members())(torch.randn(3, K).bfloat16())


# --- blocks whose code calls the layers one by one


@pytest.fixture
def block():
    block = Block()
    grouping.share_inputs(block)
    return block


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused operator."""
    calls = []
    original = grouping._linear
    monkeypatch.setattr(grouping, "_linear", lambda ls, x: calls.append(len(ls)) or original(ls, x))
    return calls


def apart(block, *arguments, **options):
    """The same block without sharing."""
    plain = grouping.unshare_inputs(copy.deepcopy(block))
    return plain(*arguments, **options)


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_block_computes_once_and_hands_out(block, fused):
    layers = [block.q_proj, block.k_proj, block.v_proj]
    x = torch.randn(2, 5, K)
    dys = [torch.randn(2, 5, m.out_features) for m in layers]
    got = run(block, layers, x, dys)
    assert fused == [3]
    want = run(separate(layers), layers, x, dys)
    for g, w in zip(got, want, strict=True):
        for what in g:
            torch.testing.assert_close(g[what], w[what])
    block(x)
    assert fused == [3, 3]  # every call anew


def test_outside_its_block_a_layer_is_alone(block, fused):
    x = torch.randn(5, K)
    block(x)
    fused.clear()
    assert torch.equal(block.k_proj(x), apart_layer(block.k_proj, x))
    assert not fused


def apart_layer(member, x):
    return copy.deepcopy(member)(x)


def test_another_tensor_is_computed_for_itself_and_sharing_ends(block, fused):
    x, context = torch.randn(5, K), torch.randn(7, K)
    assert_same(block(x, context=context), apart(block, x, context=context))
    assert fused == [3]
    assert_same(block(x, context=context), apart(block, x, context=context))
    assert fused == [3]


def test_a_tensor_changed_in_between_is_noticed(block, fused):
    x = torch.randn(5, K)
    with torch.no_grad():
        want = apart(block, x.clone(), lambda x: x.mul_(2))
        assert_same(block(x.clone(), lambda x: x.mul_(2)), want)
    assert fused == [3]


def test_a_change_of_mode_in_between_is_noticed(block):
    class Modes(Block):
        def forward(self, x):
            q = self.q_proj(x)
            with torch.no_grad():
                k = self.k_proj(x)
            with torch.autocast("cpu", torch.bfloat16):
                return q, k, self.v_proj(x)

    model = grouping.share_inputs(Modes())
    q, k, v = model(torch.randn(5, K))
    assert q.requires_grad and not k.requires_grad and v.dtype == torch.bfloat16


def test_inference_mode_runs_apart(block, fused):
    with torch.inference_mode():
        x = torch.randn(5, K)
        got = block(x)
        x.mul_(2)
    assert not fused and [y.shape[-1] for y in got] == [32, 16, 24]


def test_no_grad_shares(block, fused):
    x = torch.randn(5, K)
    with torch.no_grad():
        assert_same(block(x), apart(block, x))
    assert fused == [3]


def test_a_member_called_twice_computes_the_second_time(fused):
    class Twice(Block):
        def forward(self, x):
            return self.q_proj(x), self.q_proj(x), self.k_proj(x), self.v_proj(x)

    model = grouping.share_inputs(Twice())
    x = torch.randn(5, K)
    assert_same(model(x), apart(model, x))
    assert fused == [3]


def test_an_exception_in_between_leaves_nothing_behind(block, fused):
    x = torch.randn(5, K)
    held = weakref.ref(x)

    def fail(_x):
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        block(x, fail)
    with torch.no_grad():
        block.k_proj.lora_b.mul_(2)
    assert torch.equal(block.k_proj(x), apart_layer(block.k_proj, x))
    del x
    gc.collect()
    assert held() is None
    y = torch.randn(5, K)
    assert_same(block(y), apart(block, y))
    assert fused == [3, 3]  # an exception is no sign of different tensors


def test_nothing_is_held_after_the_call(block):
    x = torch.randn(5, K)
    y = weakref.ref(block(x)[1])
    held = weakref.ref(x)
    del x
    gc.collect()
    assert y() is None and held() is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(block, fused, reentrant):
    layers = [block.q_proj, block.k_proj, block.v_proj]
    x = torch.randn(5, K)
    dys = [torch.randn(5, m.out_features) for m in layers]
    got = run(lambda x: checkpoint(block, x, use_reentrant=reentrant), layers, x, dys)
    assert fused == [3, 3]  # once more in the recomputation
    want = run(separate(layers), layers, x, dys)
    for g, w in zip(got, want, strict=True):
        for what in g:
            torch.testing.assert_close(g[what], w[what])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_single_members(reentrant):
    class Single(Block):
        def forward(self, x):
            q = checkpoint(self.q_proj, x, use_reentrant=reentrant)
            return q, checkpoint(self.k_proj, x, use_reentrant=reentrant), self.v_proj(x)

    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this torch does not show which saved-tensor hooks are on")
    model = grouping.share_inputs(Single())
    layers = [model.q_proj, model.k_proj, model.v_proj]
    x = torch.randn(5, K)
    dys = [torch.randn(5, m.out_features) for m in layers]
    for g, w in zip(run(model, layers, x, dys), run(separate(layers), layers, x, dys), strict=True):
        for what in g:
            torch.testing.assert_close(g[what], w[what])


def test_hooks_of_members_run(block, fused):
    seen = []
    block.k_proj.register_forward_hook(lambda _m, _x, y: seen.append(y.shape))
    block(torch.randn(5, K))
    assert seen == [(5, 16)] and fused == [3]


def test_a_hook_that_changes_the_input_of_a_member_is_obeyed(block):
    block.k_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    x = torch.randn(5, K)
    torch.testing.assert_close(block(x)[1], apart_layer(block.k_proj, x))


def test_parameters_given_for_the_call_are_used(block, fused):
    x = torch.randn(5, K)
    others = {name: p.detach() * 2 for name, p in block.named_parameters() if "lora" in name}
    got = torch.func.functional_call(block, others, (x,))
    assert fused == [3]
    with torch.no_grad():
        for name, p in block.named_parameters():
            if "lora" in name:
                p.mul_(2)
    assert_same(got, apart(block, x))


def test_copies_share_among_themselves(block, fused):
    x = torch.randn(5, K)
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    for other in (copy.deepcopy(block), torch.load(stream, weights_only=False)):
        with torch.no_grad():
            other.k_proj.lora_b.zero_()
        fused.clear()
        assert torch.equal(other(x)[1], other.k_proj.base_layer(x))
        assert fused == [3]
        grouping.unshare_inputs(other)
        assert not other._forward_hooks and not other._forward_pre_hooks
        other(x)
        assert fused == [3]
    assert not torch.equal(block(x)[1], block.k_proj.base_layer(x))


def test_a_copied_member_brings_no_siblings(block):
    member = copy.deepcopy(block.q_proj)
    assert member._shared_input is None and block.q_proj._shared_input is None


def test_compiled(block):
    torch._dynamo.reset()
    x = torch.randn(5, K)
    layers = [block.q_proj, block.k_proj, block.v_proj]
    dys = [torch.randn(5, m.out_features) for m in layers]
    want = run(separate(layers), layers, x, dys)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for _ in range(2):
        got = run(compiled, layers, x, dys)
        for g, w in zip(got, want, strict=True):
            for what in g:
                torch.testing.assert_close(g[what], w[what])
    assert counter.frame_count == 1


def test_compiled_without_gradients_a_change_in_between_is_obeyed(block):
    """A trace cannot see whether x changed, so it must not share."""
    torch._dynamo.reset()

    def double(x):
        x.mul_(2)

    x = torch.randn(5, K)
    for frozen in (False, True):
        if frozen:
            block.requires_grad_(False)
        with torch.set_grad_enabled(frozen):
            want = apart(block, x.clone(), double)
            got = torch.compile(block, backend="aot_eager", fullgraph=True)(x.clone(), double)
        assert_same(got, want)


# --- whole models


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8)

    def forward(self, x):
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def test_inject_groups_and_unload_takes_the_groups_out(fused):
    model = nn.Sequential(Mlp(), Mlp())
    keys = list(afa.inject(copy.deepcopy(model), r=2).state_dict())
    afa.inject(model, r=2, group=True)
    assert list(model.state_dict()) == keys
    x = torch.randn(3, 8)
    model(x)
    assert fused == [2, 2]
    afa.set_alpha_t(model, 0.0)
    want = model(x)
    torch.testing.assert_close(afa.merge(model)(x), want)
    assert len(fused) == 4
    afa.unload(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_adapters_of_a_grouped_model_are_those_of_any_other(tmp_path):
    model = nn.Sequential(Mlp(), Mlp())
    grouped = afa.inject(copy.deepcopy(model), r=2, group=True)
    plain = afa.inject(copy.deepcopy(model), r=2)
    for p in grouped.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.requires_grad else None
    plain.load_state_dict(grouped.state_dict())
    for m, name in ((grouped, "grouped"), (plain, "plain")):
        afa.set_alpha_t(m, 0.0)
        afa.save_adapter(m, tmp_path / name)
    states = [fmt.read_weights(tmp_path / n / fmt.WEIGHTS_FILE) for n in ("grouped", "plain")]
    (tensors, metadata), (want, wanted_metadata) = states
    assert metadata == wanted_metadata and tensors.keys() == want.keys()
    assert all(torch.equal(tensors[key], want[key]) for key in want)
    configs = [(tmp_path / n / fmt.CONFIG_FILE).read_bytes() for n in ("grouped", "plain")]
    assert configs[0] == configs[1]
    x = torch.randn(3, 8)
    fresh = afa.inject(copy.deepcopy(model), r=2, group=True)
    # In norm: single elements cancel, and a group sums in another order.
    assert relative_error(afa.load_adapter(fresh, tmp_path / "plain")(x), plain(x)) < 1.3e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dropout": 0.1}, "group: dropout draws one mask for each layer"),
        ({"target_modules": ["down_proj"]}, "group: Sequential has no module with two AFA layers"),
    ],
)
def test_a_group_that_cannot_be_is_refused_before_anything_changes(options, match):
    model = nn.Sequential(Mlp())
    with pytest.raises(ValueError, match=match):
        afa.inject(model, group=True, **options)
    assert not any(isinstance(m, afa.AFALinear) for m in model.modules())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"q_proj": 8, "v_proj": 8, "o_proj": 8}, [["q_proj", "v_proj"]]),
        ({"q_proj": 8, "k_proj": 4, "v_proj": 4}, [["k_proj", "v_proj"]]),
        ({"query": 8, "key": 8, "value": 8}, [["query", "key", "value"]]),
        ({"gate_proj": 8, "up_proj": 8, "down_proj": 16}, [["gate_proj", "up_proj"]]),
        ({"c_attn": 8, "c_proj": 8}, []),
    ],
)
def test_what_shares_an_input(sizes, expected):
    assert list(grouping.groups_of(sizes)) == expected


def test_the_attention_of_real_models(fused):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    ids = torch.arange(6).view(1, 6)
    for name, config, expected in (
        ("Qwen2Model", transformers.Qwen2Config(**sizes, intermediate_size=24,
                                                num_key_value_heads=1), [3, 2]),
        ("BertModel", transformers.BertConfig(**sizes, intermediate_size=24), [3]),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        plain = afa.inject(copy.deepcopy(model), r=2)
        fused.clear()
        torch.manual_seed(0)
        grouped = afa.inject(model, r=2, group=True)
        for m in (plain, grouped):
            torch.manual_seed(1)
            for p in m.parameters():
                if p.requires_grad:
                    nn.init.normal_(p, std=0.3)
        got, want = grouped(ids).last_hidden_state, plain(ids).last_hidden_state
        assert fused == expected, name
        torch.testing.assert_close(got, want)
