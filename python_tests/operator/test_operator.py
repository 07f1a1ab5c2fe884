"""What a caller can rely on beside the numbers: shapes, what is written, what is saved, what runs
at identity."""

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_unless_available, skip_unless_taken, skip_without_memory
from helpers import Problem, eager, relative_error
from torch import func
from torch.autograd import forward_ad

import afa_kernels as afa

pytestmark = pytest.mark.fast

INPUTS = ("x", "lora_a", "lora_b")


class Calls(torch.profiler.profile):
    """Records every torch operator that really runs, those inside our own included."""

    def __init__(self):
        super().__init__(activities=[torch.profiler.ProfilerActivity.CPU])

    def count(self, *names):
        wanted = {f"aten::{name}" for name in names}
        return sum(event.name in wanted for event in self.events())


@pytest.fixture
def problem(backend, device, widest):
    return Problem.random(12, 16, 24, 4, widest, device)


def assert_close(got, want, what=""):
    """For results of many operations in one dtype: a few roundings of it apart."""
    error = relative_error(got, want)
    assert error < 16 * torch.finfo(got.dtype).eps, (what, error)


def inputs(problem, **more):
    return {name: getattr(problem, name) for name in INPUTS} | more


@pytest.mark.parametrize("leading", [(), (12,), (3, 4), (2, 3, 2)])
def test_any_number_of_leading_dimensions(backend, problem, leading):
    want = afa.afa_lora(**inputs(problem), alpha_t=0.5, backend=backend)
    rows = 12 if leading else 1
    x = problem.x[:rows].reshape(*leading, 16)
    got = afa.afa_lora(x, problem.lora_a, problem.lora_b, 0.5, backend=backend)
    assert got.shape == (*leading, 24)
    assert_close(got.reshape(rows, 24), want[:rows])
    got = afa.afa_linear(x, problem.weight, None, problem.lora_a, problem.lora_b, 0.5, backend=backend)
    assert got.shape == (*leading, 24)


def test_no_rows(backend, problem):
    leaves = problem.leaves()
    x = leaves["x"][:0].reshape(2, 0, 16)
    y = afa.afa_lora(
        x,
        leaves["lora_a"],
        leaves["lora_b"],
        0.5,
        base=leaves["base"][:0].reshape(2, 0, 24),
        backend=backend,
    )
    z = afa.afa_linear(
        x,
        leaves["weight"],
        leaves["bias"],
        leaves["lora_a"],
        leaves["lora_b"],
        0.5,
        backend=backend,
    )
    assert y.shape == z.shape == (2, 0, 24)
    (y.sum() + z.sum()).backward()
    for name in ("lora_a", "lora_b"):
        assert torch.equal(leaves[name].grad, torch.zeros_like(leaves[name]))


def test_nothing_of_the_caller_is_written(backend, problem):
    leaves = problem.leaves()
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    dy = problem.dy.clone()
    y = afa.afa_lora(*(leaves[n] for n in INPUTS), 0.5, base=leaves["base"], backend=backend)
    y.backward(dy)
    leaves["x"].grad = None
    y = afa.afa_linear(*(leaves[n] for n in ("x", "weight", "bias", "lora_a", "lora_b")), 0.5, backend=backend)
    y.backward(dy)
    for name, leaf in leaves.items():
        assert torch.equal(leaf, before[name]), name
    assert torch.equal(dy, problem.dy)


def test_inplace_writes_base_and_nothing_else(backend, problem):
    want = afa.afa_lora(**inputs(problem), alpha_t=0.5, base=problem.base, backend=backend)
    base = problem.base.clone()
    version = base._version
    got = afa.afa_lora(**inputs(problem), alpha_t=0.5, base=base, inplace=True, backend=backend)
    assert base._version > version
    assert got is base
    assert_close(base, want)


def test_inplace_is_known_to_autograd(backend, problem):
    leaves, plain = problem.leaves(), problem.leaves()
    base = leaves["base"] * 2
    y = afa.afa_lora(*(leaves[n] for n in INPUTS), 0.5, base=base, inplace=True, backend=backend)
    (y * y).sum().backward()
    y = eager(*(plain[n] for n in INPUTS), 0.5, base=plain["base"] * 2)
    (y * y).sum().backward()
    for name in (*INPUTS, "base"):
        assert_close(leaves[name].grad, plain[name].grad, name)
    # Whoever saved the old value of base is told, not given a wrong gradient.
    base = leaves["base"] * 2
    square = base * base
    afa.afa_lora(*(leaves[n] for n in INPUTS), 0.5, base=base, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("of", ["view of rows", "column slice", "transposed leading dimensions", "the input itself"])
def test_inplace_into_views(backend, problem, of):
    lora_a, lora_b = problem.lora_a, problem.lora_b
    if of == "the input itself":
        x = torch.randn_like(problem.x)
        lora_b = lora_b[:16]
        base = x
    elif of == "transposed leading dimensions":
        x = problem.x.view(3, 4, 16)
        base = torch.randn(4, 3, 24, dtype=x.dtype, device=x.device).transpose(0, 1)
    else:
        x = problem.x
        wide = torch.randn(12, 2, 24, dtype=x.dtype, device=x.device)
        base = wide[:, 0] if of == "column slice" else torch.randn(24, 24, dtype=x.dtype, device=x.device)[::2]
    want = afa.afa_lora(x, lora_a, lora_b, 0.5, base=base, backend=backend)
    got = afa.afa_lora(x, lora_a, lora_b, 0.5, base=base, inplace=True, backend=backend)
    assert got is base
    assert_close(base, want)


def test_base_of_another_dtype(backend, problem):
    base = problem.base.double()
    got = afa.afa_lora(**inputs(problem), alpha_t=0.5, base=base, backend=backend)
    assert got.dtype == torch.float64
    assert_close(got, base + afa.afa_lora(**inputs(problem), alpha_t=0.5, backend=backend))


def test_alpha_as_float_and_as_tensor_agree(backend, problem):
    got = [
        afa.afa_lora(**inputs(problem), alpha_t=alpha_t, backend=backend)
        for alpha_t in (0.25, torch.tensor(0.25), torch.tensor(0.25, device=problem.x.device))
    ]
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


def test_backward_twice(backend, problem):
    leaves = problem.leaves()
    y = afa.afa_linear(*(leaves[n] for n in ("x", "weight", "bias", "lora_a", "lora_b")), 0.5, backend=backend)
    first = torch.autograd.grad(y, (leaves["x"], leaves["lora_a"]), problem.dy, retain_graph=True)
    second = torch.autograd.grad(y, (leaves["x"], leaves["lora_a"]), problem.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_alpha_written_between_forward_and_backward_is_noticed(backend, problem):
    alpha_t = torch.tensor(0.5, device=problem.x.device)
    leaves = problem.leaves()
    y = afa.afa_lora(*(leaves[n] for n in INPUTS), alpha_t, backend=backend)
    alpha_t.fill_(0.25)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(problem.dy)


def test_what_is_saved_for_backward(backend, problem):
    leaves = problem.leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        afa.afa_lora(*(leaves[n] for n in INPUTS), 0.5, dropout_p=0.5, backend=backend)
    names = {leaf.data_ptr(): name for name, leaf in leaves.items()}
    operands = {names[t.data_ptr()] for t in saved if t.data_ptr() in names}
    assert operands == {"x", "lora_a", "lora_b"}  # not base, which may be written, nor the result
    own = sorted((tuple(t.shape), t.nbytes) for t in saved if t.data_ptr() not in names)
    alpha_t, seed, z = ((), 4), ((), 8), ((12, 4), 12 * 4 * problem.x.element_size())
    assert own == sorted([alpha_t, seed, z])


def test_nothing_is_saved_without_gradients(backend, problem):
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.no_grad(),
    ):
        y = afa.afa_lora(**inputs(problem), alpha_t=0.5, backend=backend)
    assert not saved and not y.requires_grad


def test_identity_on_torch_runs_plain_gemms():
    problem = Problem.random(12, 16, 24, 4)
    leaves = problem.leaves()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, Calls() as calls:
        operands = (leaves[n] for n in ("x", "weight", "bias", "lora_a", "lora_b"))
        y = afa.afa_linear(*operands, 0.0, backend="torch")
    assert calls.count("mm") == 1 and calls.count("addmm_") == 2  # z; the branch onto the bias; the frozen GEMM onto it
    assert not calls.count("silu", "mul", "mul_", "sigmoid", "add", "add_")
    assert (12, 4) in [tuple(t.shape) for t in saved]
    with Calls() as calls:
        y.backward(problem.dy)
    assert not calls.count("silu", "sigmoid", "where")
    plain = problem.leaves()
    want = F.linear(plain["x"], plain["weight"], plain["bias"]) + F.linear(
        F.linear(plain["x"], plain["lora_a"]), plain["lora_b"]
    )
    want.backward(problem.dy)
    assert_close(y, want)
    for name in ("x", "weight", "bias", "lora_a", "lora_b"):
        assert_close(leaves[name].grad, plain[name].grad, name)


@pytest.mark.long
def test_gradcheck_and_gradgradcheck():
    problem = Problem.random(5, 7, 6, 3, torch.float64)
    leaves = problem.leaves()
    options = {"activation": "gelu", "scaling": 1.3, "dropout_p": 0.3, "dropout_seed": 4}
    lora = [leaves[n] for n in (*INPUTS, "base")]
    linear = [leaves[n] for n in ("x", "weight", "bias", "lora_a", "lora_b")]
    for alpha_t in (0.0, 0.4, torch.tensor(1.0)):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(
                lambda x, a, b, base, t=alpha_t: afa.afa_lora(x, a, b, t, base=base, **options),
                lora,
            )
            assert check(lambda *args, t=alpha_t: afa.afa_linear(*args, t, **options), linear)


def test_double_backward_on_every_backend(backend, problem):
    leaves, plain = problem.leaves(), problem.leaves()

    def penalty(function, leaves):
        y = function(leaves["x"], leaves["lora_a"], leaves["lora_b"])
        (dx,) = torch.autograd.grad(y, leaves["x"], problem.dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [leaves[n] for n in INPUTS])

    got = penalty(lambda x, a, b: afa.afa_lora(x, a, b, 0.5, backend=backend), leaves)
    want = penalty(lambda x, a, b: eager(x, a, b, 0.5), plain)
    for name, g, w in zip(INPUTS, got, want, strict=True):
        assert_close(g, w, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(backend, device, dtype):
    skip_unless_taken(backend, dtype)
    problem = Problem.random(12, 16, 24, 4, torch.float32, device)
    leaves, plain = problem.leaves(), problem.leaves()
    with torch.autocast(problem.x.device.type, dtype):
        base = F.linear(leaves["x"], leaves["weight"])
        y = afa.afa_lora(*(leaves[n] for n in INPUTS), 0.5, base=base, inplace=True, backend=backend)
        y2 = afa.afa_linear(*(leaves[n] for n in ("x", "weight", "bias", "lora_a", "lora_b")), 0.5, backend=backend)
        want = eager(*(plain[n] for n in INPUTS), 0.5, base=F.linear(plain["x"], plain["weight"]))
    assert y.dtype == y2.dtype == dtype
    (y.float() + y2.float()).square().sum().backward()
    want2 = eager(*(plain[n] for n in INPUTS), 0.5, weight=plain["weight"], bias=plain["bias"])
    (want.float() + want2).square().sum().backward()
    for name in ("x", "weight", "bias", "lora_a", "lora_b"):
        assert leaves[name].grad.dtype == torch.float32
        error = (leaves[name].grad - plain[name].grad).norm() / plain[name].grad.norm()
        assert error < 8 * torch.finfo(dtype).eps, (name, error)


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def gradients_in_a_batch(f, x):
    x = x.detach().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.stack([y.detach(), y.detach().cos()]), is_grads_batched=True)[0]


TRANSFORMS = {
    "grad": lambda f, x: func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: func.vmap(f)(x.unflatten(0, (2, -1))),
    "vmap of grad": lambda f, x: func.vmap(func.grad(lambda x: f(x).square().sum()))(x.unflatten(0, (2, -1))),
    "grad of vmap": lambda f, x: func.grad(lambda x: func.vmap(f)(x.unflatten(0, (2, -1))).square().sum())(x),
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(lambda x: f(x).square().sum())(x),
    "forward mode": forward_mode,
    "is_grads_batched": gradients_in_a_batch,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("alpha_t", [0.0, 0.5])
@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform, name, alpha_t):
    p = Problem.random(6, 8, 5, 3, torch.float64 if name != "cpu" else torch.float32)
    skip_unless_available(name)
    options = {"activation": "tanh", "scaling": 1.5}
    adapter = {"lora_a": p.lora_a, "lora_b": p.lora_b, "alpha_t": alpha_t} | options

    def base_of(x):
        return x[..., :5] * 2

    for ours, plain in (
        (lambda x: afa.afa_lora(x, **adapter, backend=name), lambda x: eager(x, **adapter)),
        (
            lambda x: afa.afa_lora(x, **adapter, base=base_of(x), inplace=True, backend=name),
            lambda x: eager(x, **adapter, base=base_of(x)),
        ),
        (
            lambda x: afa.afa_linear(x, p.weight, p.bias, **adapter, backend=name),
            lambda x: eager(x, **adapter, weight=p.weight, bias=p.bias),
        ),
    ):
        torch.testing.assert_close(transform(ours, p.x), transform(plain, p.x))


def test_transforms_and_dropout():
    """The mask is that of the seed, for each sample that vmap computes; a seed that is drawn is for vmap to allow."""
    p = Problem.random(6, 8, 5, 3)
    call = lambda x, **seed: afa.afa_lora(x, p.lora_a, p.lora_b, 0.5, dropout_p=0.5, **seed)  # noqa: E731
    samples = p.x.unflatten(0, (2, -1))
    got = func.vmap(lambda x: call(x, dropout_seed=4))(samples)
    torch.testing.assert_close(got, torch.stack([call(x, dropout_seed=4) for x in samples]))
    with pytest.raises(RuntimeError, match="randomness"):
        func.vmap(call)(samples)
    first, second = func.vmap(call, randomness="different")(torch.stack([p.x, p.x]))
    assert not torch.equal(first, second)


def test_transforms_of_alpha_t():
    p = Problem.random(6, 8, 5, 3)
    values = torch.tensor([0.25, 0.75])
    call = lambda alpha_t: afa.afa_lora(p.x, p.lora_a, p.lora_b, alpha_t)  # noqa: E731
    torch.testing.assert_close(func.vmap(call)(values), torch.stack([call(value) for value in values]))
    with pytest.raises(ValueError, match="not differentiable in alpha_t"):
        func.grad(lambda alpha_t: call(alpha_t).sum())(values[0])


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    skip_without_memory(12)
    m, k = 2**21 + 3, 1032  # M * K > 2^31; rows at both ends and past the boundary are compared
    x = torch.randn(m, 1, dtype=torch.bfloat16).expand(m, k).contiguous()
    a, b = torch.randn(2, k).bfloat16() / 32, torch.randn(8, 2).bfloat16()
    y = afa.afa_lora(x, a, b, 0.5)
    for rows in (slice(0, 5), slice(m - 5, m), slice(2**31 // k - 2, 2**31 // k + 3)):
        assert torch.equal(y[rows], afa.afa_lora(x[rows], a, b, 0.5)) or torch.allclose(
            y[rows].float(), afa.afa_lora(x[rows], a, b, 0.5).float(), rtol=2e-2, atol=2e-2
        )
