"""The operator with rows by owner: what each owner gets, what no owner gets, and what torch sees of it."""

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from conformance.properties import PROPERTIES, check
from conformance.targets import TorchTarget
from conftest import skip_where_torch_reads_past_rows
from helpers import eager, poisoned_memory, relative_error
from rows_by_owner import BACKENDS, OF_BRANCH, OF_LINEAR, ByOwner, takes_owners

import afa_kernels as afa
from afa_kernels import torch_private
from afa_kernels.backend import torch as torch_ops
from afa_kernels.operator import frozen
from bench.memory import allocations

pytestmark = pytest.mark.fast

SIZES = (5, 0, 17, 1, 60, 0)  # owners without rows among them, and at the end


def sharing(what: str, p: ByOwner) -> ByOwner:
    """Return the problem with a weight and a bias that owners share: all of them, or each two in a row."""
    each = len(p.weight) // 2 if "pairs" in what else len(p.weight)
    return p.changed(
        weight=p.weight[0] if "weight" in what else p.weight[:each],
        bias=None if what == "no bias" else p.bias[0] if "bias" in what else p.bias[:each],
    )


@pytest.fixture(params=BACKENDS)
def name(request) -> str:
    if not takes_owners(request.param):
        pytest.skip(f"{request.param} cannot run")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])  # other orders of the GEMM
def test_what_belongs_to_no_branch_is_the_frozen_part(name, dtype):
    """Rows behind the last offset, and owners of rank 0, whose A and B may hold anything."""
    skip_where_torch_reads_past_rows(name, dtype)
    p = ByOwner.random(SIZES, 33, 20, 4, dtype, tail=7, ranks=[4, 2, 0, 3, 4, 1])
    p.lora_a[2] = p.lora_b[2] = float("nan")
    p.lora_a[3, 3:] = p.lora_b[3, :, 3:] = float("nan")
    rows = torch.cat([torch.arange(5, 22), torch.arange(83, 90)])
    with poisoned_memory():
        branch = p.run(p.lora, OF_BRANCH, backend=name)
        whole = p.run(p.linear, OF_LINEAR, backend=name)
        unbiased = p.linear({what: getattr(p, what) for what in OF_LINEAR} | {"bias": None}, backend=name)
        bare = p.lora({name: getattr(p, name) for name in ("x", "lora_a", "lora_b")}, backend=name)
    assert torch.equal(branch["y"][rows], p.base[rows]) and not branch["x"][rows].any() and not bare[rows].any()
    frozen_y = p.x[5:22].double() @ p.weight[2].T.double() + p.bias[2].double()
    assert relative_error(whole["y"][5:22], frozen_y) <= 4 * torch.finfo(dtype).eps
    frozen_dx = p.dy[5:22].double() @ p.weight[2].double()
    assert relative_error(whole["x"][5:22], frozen_dx) <= 4 * torch.finfo(dtype).eps
    assert not whole["y"][83:].any() and not whole["x"][83:].any() and not unbiased[83:].any()
    for gradients in (branch, whole):
        assert all(torch.isfinite(t).all() for t in gradients.values())
        assert not gradients["lora_a"][2].any() and not gradients["lora_b"][2].any()


@pytest.mark.parametrize("shared", ["", "weight", "pairs"])
def test_gradients_that_can_be_differentiated_are_those_of_the_kernels(name, shared):
    p = sharing(shared, ByOwner.random(SIZES, 33, 20, 4, torch.float32, tail=7))
    leaves = p.leaves(OF_LINEAR)
    y = p.linear(leaves, backend=name, dropout_p=0.25, dropout_seed=3)
    plain, graph = (
        torch.autograd.grad(y, list(leaves.values()), p.dy, retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    for what, one, other in zip(leaves, plain, graph, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5, msg=what)


def test_a_base_that_is_written_has_a_new_version(name):
    """Without gradients nobody else tells autograd that it was written."""
    p = ByOwner.random(SIZES, 33, 20, 4)
    version = p.base._version
    p.lora(inplace=True, backend=name)
    assert p.base._version > version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("shared", ["", "weight", "bias", "weight, bias", "no bias", "pairs", "pairs, bias"])
@pytest.mark.parametrize("sizes", [SIZES, (20, 20, 20, 20)], ids=["uneven", "even"])
def test_linear_is_as_accurate_as_torch(name, dtype, shared, sizes):
    p = sharing(shared, ByOwner.random(sizes, 48, 40, 5, dtype))
    names = tuple(n for n in OF_LINEAR if getattr(p, n) is not None)
    fixed = {} if p.bias is not None else {"bias": None}

    def plain(leaves, dtype):
        t = {what: leaf.to(dtype) for what, leaf in leaves.items()}
        pieces = []
        for g, rows in p.runs():
            rank = int(p.ranks[g])
            weight = t["weight"] if t["weight"].dim() == 2 else t["weight"][g * len(t["weight"]) // len(sizes)]
            bias = t.get("bias")
            bias = bias if bias is None or bias.dim() == 1 else bias[g * len(bias) // len(sizes)]
            pieces.append(eager(
                t["x"][rows], t["lora_a"][g, :rank], t["lora_b"][g, :, :rank], p.alpha_t[g].item(),
                scaling=p.scaling[g].item(), weight=weight, bias=bias,
            ))  # fmt: skip
        return torch.cat(pieces)

    def gradients(function):
        leaves = p.leaves(names)
        y = function(leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), p.dy.to(y.dtype))]

    got = gradients(lambda leaves: p.linear(leaves, **fixed, backend=name))
    same, truth = (gradients(lambda leaves, to=to: plain(leaves, to)) for to in (dtype, torch.float64))
    for what, value, torch_value, exact in zip(("y", *names), got, same, truth, strict=True):
        allowed = 2 * relative_error(torch_value, exact) + torch.finfo(dtype).eps
        assert relative_error(value, exact) <= allowed, what


def test_identity_is_the_two_products(name):
    p = ByOwner.random(SIZES, 30, 20, 3)
    for alpha_t in (0.0, torch.zeros(6)):
        got = p.run(p.linear, OF_LINEAR, backend=name, alpha_t=alpha_t)
        for g, rows in p.runs():
            w = p.weight[g] + p.scaling[g] * p.lora_b[g, :, : p.ranks[g]] @ p.lora_a[g, : p.ranks[g]]
            torch.testing.assert_close(got["y"][rows], p.x[rows] @ w.T + p.bias[g], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got["x"][rows], p.dy[rows] @ w, rtol=1e-4, atol=1e-4)


def test_the_base_is_accumulated_into_where_asked(name):
    p = ByOwner.random(SIZES, 30, 20, 3, tail=2)
    want = p.run(p.lora, OF_BRANCH, backend=name)
    with torch.no_grad():
        kept, base = p.base.clone(), p.base.clone()
        p.lora(backend=name)
        assert torch.equal(p.base, kept), "the base was written"
        assert p.changed(base=base).lora(inplace=True, backend=name) is base
    torch.testing.assert_close(base, want["y"])
    leaves = p.leaves(OF_BRANCH)
    base = leaves["base"] * 1
    y = p.lora(leaves | {"base": base}, inplace=True, backend=name)
    assert y is base
    for what, value in zip(OF_BRANCH, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True):
        torch.testing.assert_close(value, want[what], msg=what)


def test_gradients_are_those_of_the_formula_twice():
    p = ByOwner.random((2, 0, 3), 4, 3, 2, torch.float64, tail=1, ranks=[1, 2, 2])
    leaves = p.leaves(OF_LINEAR)

    def function(*tensors):
        t = dict(zip(OF_LINEAR, tensors, strict=True))
        branch = {"x": t["x"], "lora_a": t["lora_a"], "lora_b": t["lora_b"]}
        dropped = p.lora(branch, activation="gelu", dropout_p=0.3, dropout_seed=3)
        return p.linear(t, activation="tanh") + dropped

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_no_rows_at_all(name):
    p = ByOwner.random((0, 0), 6, 4, 2)
    got = p.run(p.linear, OF_LINEAR, backend=name)
    assert got["y"].shape == (0, 4) and got["x"].shape == (0, 6)
    assert not any(t.any() for t in got.values())


def test_compiles_once_for_all_offsets():
    p = ByOwner.random((8, 0, 20, 4), 16, 12, 3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    alpha_t = torch.tensor(0.5)

    def function(offsets, x, weight, bias, lora_a, lora_b):
        options = {"scaling": 2.0, "dropout_p": 0.2, "dropout_seed": 5}
        return afa.afa_linear(x, weight, bias, lora_a, lora_b, alpha_t, offsets=offsets, **options)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for sizes in ((8, 0, 20, 4), (0, 0, 32, 0), (1, 1, 1, 29), (10, 2, 3, 4)):
        offsets = torch.tensor(sizes).cumsum(0).int()
        alpha_t.mul_(0.9)
        results = []
        for call in (compiled, function):
            leaves = p.leaves(OF_LINEAR)
            y = call(offsets, **leaves)
            y.backward(p.dy)
            results.append([y.detach(), *(t.grad for t in leaves.values())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_autocast_rounds_as_it_does_elsewhere(name):
    p = ByOwner.random(SIZES, 32, 24, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = p.run(lambda leaves, **options: p.linear(leaves, **options).float(), OF_LINEAR, backend=name)
    narrow = p.changed(x=p.x.bfloat16(), weight=p.weight.bfloat16(), dy=p.dy.bfloat16())
    want = narrow.run(narrow.linear, OF_LINEAR, backend=name)
    for what, value in got.items():
        assert torch.equal(value, want[what].to(value.dtype)), what
    assert got["lora_a"].dtype == torch.float32


BAD = {
    "offsets decrease": ({"offsets": torch.tensor([3, 2, 6]).int()}, ValueError, r"offsets: .*got 2 for owner 1"),
    "offsets beyond x": (
        {"offsets": torch.tensor([1, 2, 7]).int()},
        ValueError,
        r"offsets: .*0 to 6.*got 7 for owner 2",
    ),
    "offsets below 0": ({"offsets": torch.tensor([-1, 2, 6]).int()}, ValueError, r"offsets: .*got -1 for owner 0"),
    "offsets of int64": ({"offsets": torch.tensor([1, 2, 6])}, TypeError, "offsets: expected int32, got int64"),
    "offsets of other owners": ({"offsets": torch.tensor([1, 6]).int()}, ValueError, r"offsets: .*\(3,\).*got \(2,\)"),
    "offsets a list": ({"offsets": [1, 2, 6]}, TypeError, "offsets: expected a torch.Tensor, got list"),
    "ranks above r": ({"ranks": torch.tensor([1, 3, 2]).int()}, ValueError, "ranks: .*0 to 2, got 3 for owner 1"),
    "ranks of float": ({"ranks": torch.ones(3)}, TypeError, "ranks: expected int32, got float32"),
    "alpha_t above 1": ({"alpha_t": torch.tensor([0, 0.5, 1.5])}, ValueError, "alpha_t: .*1.0, got 1.5 for owner 2"),
    "alpha_t of other owners": ({"alpha_t": torch.ones(2)}, ValueError, r"alpha_t: expected shape \(3,\)"),
    "scaling NaN": ({"scaling": torch.tensor([1, float("nan"), 1])}, ValueError, "scaling: expected finite"),
    "a without owners": ({"lora_a": torch.ones(2, 8)}, ValueError, r"lora_a: expected shape \(owners, r, 8\)"),
    "b of other r": ({"lora_b": torch.ones(3, 5, 3)}, ValueError, r"lora_b: expected shape \(3, out_features, 2\)"),
    "x of three dimensions": ({"x": torch.ones(1, 6, 8)}, ValueError, r"x: expected shape \(rows, in_features\)"),
    "weight of other owners": ({"weight": torch.ones(2, 5, 8)}, ValueError, r"weight: expected shape \(3, 5, 8\)"),
    "weight of no owner": ({"weight": torch.ones(0, 5, 8)}, ValueError, "weight: .*a divisor of 3 in its place"),
    "weight of another dtype": ({"weight": torch.ones(3, 5, 8).half()}, TypeError, "weight: expected float32"),
    "bias of other owners": ({"bias": torch.ones(2, 5)}, ValueError, r"bias: expected shape \(3, 5\)"),
    "bias of more owners than weights": (
        {"weight": torch.ones(1, 5, 8), "bias": torch.ones(3, 5)},
        ValueError,
        r"bias: expected shape \(1, 5\)",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, message):
    good = {
        "x": torch.randn(6, 8),
        "offsets": torch.tensor([1, 3, 6]).int(),
        "weight": torch.randn(3, 5, 8),
        "bias": None,
        "lora_a": torch.randn(3, 2, 8),
        "lora_b": torch.randn(3, 5, 2),
        "alpha_t": 0.5,
    }
    with pytest.raises(error, match=message):
        afa.afa_linear(**(good | change))


def test_nothing_of_the_size_of_all_weights_is_allocated(name):
    owners, k, n, r = 32, 96, 80, 4
    p = ByOwner.random([1, 5, 0, 2] * (owners // 4), k, n, r)
    names = ("x", "lora_a", "lora_b")
    leaves = p.leaves(names)
    frozen = {"weight": p.weight, "bias": p.bias}

    def step():
        y = p.linear(leaves | frozen, backend=name)
        return y, torch.autograd.grad(y, list(leaves.values()), p.dy)

    step()
    peak, total = allocations(step)
    all_weights = p.weight.nbytes
    gradients = sum(t.nbytes for t in leaves.values())
    assert peak < gradients + all_weights / 4 and total < all_weights, (peak, total, gradients, all_weights)


def test_rows_of_no_owner_get_what_their_gradient_says():
    """With a weight for all owners and a bias for each, the frozen part of such rows is the product alone."""
    p = ByOwner.random((2, 0, 3), 4, 3, 2, torch.float64, tail=2)
    p = p.changed(weight=p.weight[0])
    leaves = p.leaves(OF_LINEAR)
    for name in ("torch", "reference"):
        call = lambda *tensors, name=name: p.linear(dict(zip(OF_LINEAR, tensors, strict=True)), backend=name)  # noqa: E731
        assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_plan_names_the_way_of_the_frozen_part(monkeypatch):
    p = ByOwner.random(SIZES, 32, 24, 4, torch.bfloat16)
    even = ByOwner.random((9, 9, 9), 32, 24, 4)

    def plan(p, **options):
        return afa.plan(p.x, p.lora_a, p.lora_b, p.alpha_t, offsets=p.offsets, scaling=p.scaling, **options)

    assert plan(even, weight=even.weight).frozen == ": ".join(frozen.LOOP)
    assert plan(even, weight=even.weight[0]).frozen == ": ".join(frozen.SHARED)
    pairs = ByOwner.random((4, 5, 6, 3), 32, 24, 4)
    assert plan(pairs, weight=pairs.weight[:2]).frozen == ": ".join(frozen.LOOP)
    assert plan(even).frozen == "" and plan(even).path == "fused" and plan(even, backend="torch").backend == "torch"
    assert afa.plan(even.x, even.lora_a, even.lora_b, 0.0, offsets=even.offsets).path == "gemm"
    monkeypatch.setattr(frozen.torch_private, "has_fast_gemm", lambda dtype: True)
    assert plan(p, weight=p.weight).frozen == ": ".join(frozen.LOOP)
    with_it = p.run(p.linear, OF_LINEAR)
    monkeypatch.setattr(frozen.torch_private, "has_fast_gemm", lambda dtype: dtype == torch.float32)
    expected = f"forward {': '.join(frozen.LOOP)}; backward {': '.join(frozen.WIDE)}"
    assert plan(p, weight=p.weight).frozen == expected
    for what, value in p.run(p.linear, OF_LINEAR).items():
        torch.testing.assert_close(value, with_it[what], rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="offsets: "):
        afa.plan(p.x, p.lora_a, p.lora_b, 0.5, offsets=p.offsets[:2])
    with pytest.raises(ValueError, match="weight: "):
        plan(p, weight=p.weight[:4])


@pytest.mark.parametrize("grouped_mm", [None, len], ids=["without", "with"])
def test_a_torch_without_grouped_mm_multiplies_in_loops_on_a_gpu(monkeypatch, grouped_mm):
    monkeypatch.setattr(torch_private, "_grouped_mm", grouped_mm)
    p = ByOwner.random((4, 5, 6), 24, 16, 8)
    rows = SimpleNamespace(is_cpu=False, dtype=torch.bfloat16, shape=p.x.shape)
    assert frozen.way_of(rows, p.weight.mT) is (frozen.LOOP if grouped_mm is None else frozen.GROUPED)


@pytest.mark.skipif(not torch_private.has_grouped_mm(), reason="needs grouped_mm")
def test_float64_is_multiplied_in_loops_on_a_gpu():
    """torch's grouped_mm refuses it."""
    p = ByOwner.random((4, 5, 6), 24, 16, 8, torch.float64)
    with pytest.raises(RuntimeError, match="Double"):
        torch_private.grouped_mm(p.x, p.weight.mT, p.offsets)
    on_gpu = SimpleNamespace(is_cpu=False, dtype=torch.float64, shape=p.x.shape)
    assert frozen.way_of(on_gpu, p.weight.mT) is frozen.LOOP and not torch_ops._on_device(on_gpu)
    assert torch_ops._on_device(SimpleNamespace(is_cpu=False, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch_private.has_grouped_mm(), reason="needs grouped_mm")
@pytest.mark.parametrize("promise", PROPERTIES, ids=lambda promise: promise.name)
def test_the_products_of_a_gpu_on_cpu_tensors(promise, monkeypatch):
    """The ``torch`` backend takes torch's grouped_mm on GPUs; torch runs that on a CPU too."""
    where = TorchTarget("torch")
    if promise.exact or "owners" not in promise.kinds:
        pytest.skip("of bits, or of other calls")
    monkeypatch.setattr(torch_ops, "_forward_in_loop", torch_ops._forward_together)
    monkeypatch.setattr(torch_ops, "_backward_in_loop", torch_ops._backward_together)
    for number in range(12):
        check(where, "owners", promise, number)
