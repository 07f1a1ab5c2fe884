"""Layers on one x: the numbers of separate layers, one pass over x, and what is refused."""

import pytest
import torch
from helpers import DTYPES, altered, assert_as_accurate_as_torch
from shared_input_helpers import K, layer, members, run, separate
from torch import func, nn

import afa_kernels as afa
from afa_kernels.backend import choice, interface
from afa_kernels.backend import torch as torch_ops
from afa_kernels.layers import shared_input

pytestmark = pytest.mark.fast


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
def test_shared_input_computes_what_its_layers_compute(backend, device, name, shape):
    dtype = DTYPES[name]
    layers = [m.to(device) for m in members(dtype, backend=backend)]
    x = torch.randn(shape, device=device, dtype=dtype)
    skip_unless_taken(backend, layers, x)
    dys = [torch.randn(*shape[:-1], m.out_features, device=device, dtype=dtype) for m in layers]
    apart = members(dtype, backend="torch")
    truth = members(torch.float64, backend="reference")
    for others in (apart, truth):
        for other, member in zip(others, layers, strict=True):
            other.to(device).load_state_dict(member.state_dict())
    shared = afa.AFASharedInput(layers)
    assert shared_input.why_separate(layers, x) is None
    got = run(shared, layers, x, dys)
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
    got, want = run(afa.AFASharedInput(layers), layers, x, dys), run(separate(layers), layers, x, dys)
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
    got = run(afa.AFASharedInput(layers), layers, x, dys)
    want = run(separate(layers), layers, x, dys)
    for g, w in zip(got, want, strict=True):
        for what in g:
            assert torch.equal(g[what], w[what]), what


def test_gradients_of_shared_input_are_its_derivatives():
    layers = [layer(n, 2, dtype=torch.float64, activation=act) for n, act in ((3, "silu"), (4, "gelu"))]
    shared = afa.AFASharedInput(layers)
    leaves = [p for m in layers for p in (m.lora_a, m.lora_b)]
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def function(x, *_parameters):
        return shared(x)

    torch.autograd.gradcheck(function, (x, *leaves), fast_mode=True)
    torch.autograd.gradgradcheck(function, (x, *leaves), fast_mode=True)


def test_gradients_that_are_differentiated_again_are_the_same():
    layers = members()
    x = torch.randn(5, K, requires_grad=True)
    leaves = [x, *(p for m in layers for p in (m.lora_a, m.lora_b))]
    y = sum(y.square().sum() for y in afa.AFASharedInput(layers)(x))
    once = torch.autograd.grad(y, leaves, retain_graph=True)
    twice = torch.autograd.grad(y, leaves, create_graph=True)
    for got, want in zip(twice, once, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("alpha_t", [0.0, 0.5])
def test_z_is_saved_for_the_backward_at_identity_too(alpha_t):
    layers = [layer(n, 5, alpha_t=alpha_t) for n in (32, 16)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        afa.AFASharedInput(layers)(torch.randn(6, K))
    assert saved.count((6, 5)) == 2


@pytest.mark.parametrize("alone", [(0,), (1, 2), (0, 1)])
def test_outputs_that_nobody_differentiates(alone):
    layers = members()
    x = torch.randn(5, K)
    dys = [torch.randn(5, m.out_features) for m in layers]
    _, got = run(afa.AFASharedInput(layers), layers, x, dys, alone)
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
    sum(y.sum() for y in afa.AFASharedInput(layers)(x)).backward()
    grads = [(m.lora_a.grad is not None, m.lora_b.grad is not None) for m in layers]
    assert grads == [(False, True), (True, False), (True, True)]


def test_backward_twice_gives_the_same():
    layers = members()
    x = torch.randn(5, K, requires_grad=True)
    y = sum(y.square().sum() for y in afa.AFASharedInput(layers)(x))
    first = torch.autograd.grad(y, [x, layers[0].lora_a], retain_graph=True)
    second = torch.autograd.grad(y, [x, layers[0].lora_a])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_outputs_may_be_changed_in_place():
    layers = members()
    x = torch.randn(2, 5, K)
    dys = [torch.randn(2, 5, m.out_features) for m in layers]
    shared = afa.AFASharedInput(layers)
    _, got = run(lambda x: [y.mul_(2) for y in shared(x)], layers, x, dys)
    _, want = run(lambda x: [m(x) * 2 for m in layers], layers, x, dys)
    for what in want:
        torch.testing.assert_close(got[what], want[what])


def test_no_rows():
    layers = members()
    x = torch.randn(0, K, requires_grad=True)
    ys = afa.AFASharedInput(layers)(x)
    assert [y.shape for y in ys] == [(0, m.out_features) for m in layers]
    sum(y.sum() for y in ys).backward()
    assert x.grad.shape == (0, K) and not layers[0].lora_a.grad.any()


def test_ranks_beyond_the_limit_of_a_backend_when_stacked():
    layers = [layer(8, 200), layer(8, 200)]
    x = torch.randn(3, K)
    for y, m in zip(afa.AFASharedInput(layers)(x), layers, strict=True):
        torch.testing.assert_close(y, m(x))


def test_adapters_of_different_dtypes_keep_theirs():
    layers = [layer(8, dtype=torch.bfloat16), layer(8, dtype=torch.bfloat16)]
    layers[1].to(torch.bfloat16)
    sum(y.float().sum() for y in afa.AFASharedInput(layers)(torch.randn(4, K).bfloat16())).backward()
    assert [m.lora_a.grad.dtype for m in layers] == [torch.float32, torch.bfloat16]


def test_autocast():
    layers = members()
    x = torch.randn(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = afa.AFASharedInput(layers)(x), separate(layers)(x)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)


# --- one pass over x


def test_shared_input_reads_x_once_in_each_direction():
    layers = [layer(n, backend="torch") for n in (32, 16, 16)]
    x = torch.randn(6, K, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = afa.AFASharedInput(layers)(x)
    assert sum(t.shape == x.shape for t in saved) == 1
    assert len({y.grad_fn for y in ys}) == 1  # one node: its backward sees all gradients at once


@pytest.fixture
def spies(monkeypatch):
    """Makes backends that record their calls: ``spies(name, **fields)``; returns the record too."""
    seen = []

    def recorded(name, function):
        return lambda *args, **kwargs: seen.append(name) or function(*args, **kwargs)

    def make(name, **fields):
        passes = {key: recorded(key, getattr(torch_ops.BACKEND, key)) for key in PASSES}
        spy = altered(torch_ops.BACKEND, name=name, automatic=False, **passes, **fields)
        monkeypatch.setitem(choice._BACKENDS, name, spy)
        choice.forget_choices()

    yield make, seen
    choice.forget_choices()


PASSES = ("forward", "backward", "forward_shared", "backward_shared")


def step(layers):
    x = torch.randn(6, K, requires_grad=True)
    sum(y.sum() for y in afa.AFASharedInput(layers)(x)).backward()


def test_shared_input_is_one_call_of_the_backend_in_each_direction(spies):
    make, seen = spies
    make("spy")
    step([layer(n, backend="spy") for n in (32, 16)])
    assert seen == ["forward_shared", "backward_shared"]


@pytest.mark.parametrize(
    "fields",
    [{"takes_shared_input": False}, {"refuses_together": lambda calls: f"takes less than {len(calls)} layers"}],
    ids=["without passes for it", "refusing"],
)
def test_members_of_another_backend_are_calls_of_their_own(spies, fields):
    make, seen = spies
    make("spy", **fields)
    layers = [layer(n, backend="spy") for n in (32, 16)]
    step(layers)
    assert seen == ["forward"] * 2 + ["backward"] * 2
    ys = afa.AFASharedInput(layers)(torch.randn(6, K))
    assert len({y.grad_fn for y in ys}) == 2  # each layer's own


def test_why_a_backend_does_not_take_layers_together(spies):
    make, _ = spies
    make("alone", takes_shared_input=False)
    make("choosy", refuses_together=lambda calls: f"takes less than {len(calls)} layers")
    make("spy")
    calls = tuple(interface.Call("cpu", torch.float32, 4, K, n, 4, "silu") for n in (32, 16))
    assert choice.select_together(calls, "alone") == (None, "alone takes one layer at a time")
    assert choice.select_together(calls, "choosy") == (None, "choosy takes less than 2 layers")
    assert choice.select_together(calls, "spy")[0].name == "spy"
    dropping = (calls[0], calls[1]._replace(dropout=True))
    assert choice.select_together(dropping, "spy") == (None, "dropout draws one mask for each layer")


def test_members_whose_backends_differ_run_one_by_one():
    calls = tuple(interface.Call("cpu", torch.float32, 4, K, 8, r, "silu") for r in (4, 300))
    if choice.select(calls[0], None).backend.name != "cpu":
        pytest.skip("one backend takes all ranks")
    together, reason = choice.select_together(calls, None)
    assert together is None and reason == "the members run on different backends (cpu, torch)"
    layers, x = [layer(8, 4), layer(8, 300)], torch.randn(4, K)
    for y, m in zip(afa.AFASharedInput(layers)(x), layers, strict=True):
        assert torch.equal(y, m(x))


# --- what is refused


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
def test_what_cannot_share_is_named(make, error, match):
    with pytest.raises(error, match=match):
        afa.AFASharedInput(make())


SEPARATE = {
    "merged": lambda m: (m.set_alpha_t(0.0), m.merge()),
    "dropout": lambda m: setattr(m, "dropout", 0.5),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "hook of the base": lambda m: m.base_layer.register_forward_hook(lambda *_: None),
    "own forward": lambda m: setattr(m, "forward", m.forward),
    "backend": lambda m: setattr(m, "backend", "reference"),
    "trained base": lambda m: m.base_layer.weight.requires_grad_(),
}


@pytest.mark.parametrize("obstacle", SEPARATE)
def test_members_that_cannot_share_run_one_by_one(obstacle):
    layers = members()
    SEPARATE[obstacle](layers[1])
    x = torch.randn(5, K, requires_grad=True)
    assert shared_input.why_separate(layers, x)
    torch.manual_seed(0)
    got = afa.AFASharedInput(layers)(x)
    torch.manual_seed(0)
    for g, w in zip(got, separate(layers)(x), strict=True):
        assert torch.equal(g, w)


def test_an_input_that_does_not_fit_gets_the_error_of_the_layer():
    with pytest.raises(ValueError, match="lora_a: expected shape"):
        afa.AFASharedInput(members())(torch.randn(3, K + 1))
    with pytest.raises(TypeError, match="dtype of x"):
        afa.AFASharedInput(members())(torch.randn(3, K).bfloat16())


def test_members_in_transforms_of_torch_func():
    """They compute one by one there; gradients that are asked for in a batch are those of separate layers."""
    layers, x = members(), torch.randn(6, K)
    shared = afa.AFASharedInput(layers)
    for transform in (lambda f: func.jacrev(f)(x), lambda f: func.vmap(f)(x), lambda f: func.jvp(f, (x,), (x.cos(),))):
        for got, want in zip(transform(shared), transform(separate(layers)), strict=True):
            torch.testing.assert_close(got, want)
    leaf = x.clone().requires_grad_()
    for i, (one, other) in enumerate(zip(shared(leaf), separate(layers)(leaf), strict=True)):
        batch = torch.randn(3, *one.shape)
        got, want = (
            torch.autograd.grad(y, leaf, batch, retain_graph=True, is_grads_batched=True)[0] for y in (one, other)
        )
        torch.testing.assert_close(got, want, msg=str(i))
