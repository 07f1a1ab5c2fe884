"""torch.library and torch.compile: schemas hold, whole graphs, one compilation for every
alpha_t."""

import pytest
import torch
import torch._dynamo.testing
from helpers import Problem
from torch.library import opcheck

import afa_kernels as afa

OPTIONS = ("gelu", 1.5)
NO_OWNERS = (None, None, None)


def operands(dtype=torch.float32, dropout=64):
    problem = Problem.random(6, 16, 8, 4, dtype)
    return problem, (torch.tensor(0.3), torch.tensor(5), *NO_OWNERS, *OPTIONS, dropout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("save_z", [True, False])
def test_opcheck_forward(dtype, save_z):
    p, options = operands(dtype)
    branch = (p.x, p.lora_a, p.lora_b, *options, save_z, None)
    opcheck(torch.ops.afa_kernels.lora_forward, (p.base, *branch))
    opcheck(torch.ops.afa_kernels.lora_forward, (None, *branch))
    opcheck(torch.ops.afa_kernels.lora_forward_, (p.base, *branch))
    opcheck(torch.ops.afa_kernels.linear_forward, (p.weight, p.bias, *branch))
    opcheck(torch.ops.afa_kernels.linear_forward, (p.weight, None, *branch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (True, False, True)])
def test_opcheck_backward(dtype, needed):
    p, options = operands(dtype)
    saved = (p.dy, p.x, p.lora_a, p.lora_b, p.x @ p.lora_a.T, *options, True, None)
    opcheck(torch.ops.afa_kernels.lora_backward, (*saved, *needed))
    opcheck(torch.ops.afa_kernels.linear_backward, (p.weight, *saved, *needed[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_opcheck_shared_input(dtype):
    q, k = Problem.random(6, 16, 8, 4, dtype), Problem.random(6, 16, 12, 2, dtype)
    a, b, alpha_t = [q.lora_a, k.lora_a], [q.lora_b, k.lora_b], [torch.tensor(0.3)] * 2
    options = (a, b, alpha_t, ["gelu", "identity"], [1.5, 2.0])
    weights = [q.weight, k.weight]
    for save_z in (True, False):
        opcheck(torch.ops.afa_kernels.forward_shared, (q.x, weights, [q.bias, None], *options, save_z, None))
    zs = [q.x @ q.lora_a.T, q.x @ k.lora_a.T]
    for dys, needed in (
        ([q.dy, k.dy], (True, [True, True], [True, False])),
        ([None, k.dy], (True, [True, True], [True, True])),
        ([q.dy, k.dy], (False, [False, True], [False, False])),
    ):
        saved = (dys, q.x, weights, a, b, zs, *options[2:], None)
        opcheck(torch.ops.afa_kernels.backward_shared, (*saved, *needed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("save_z", [True, False])
def test_opcheck_by_owner(dtype, save_z):
    members = [Problem.random(6, 16, 8, 4, dtype) for _ in range(3)]
    x, dy, base = members[0].x, members[0].dy, members[0].base
    weight, bias, a, b = (
        torch.stack([getattr(p, name) for p in members]) for name in ("weight", "bias", "lora_a", "lora_b")
    )
    offsets, ranks = torch.tensor([2, 2, 5], dtype=torch.int32), torch.tensor([4, 1, 3], dtype=torch.int32)
    alpha_t, scaling = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([1.0, 2.0, 0.5])
    rest = (alpha_t, torch.tensor(5), offsets, ranks, scaling, "gelu", 1.0, 64, save_z, None)
    branch = (x, a, b, *rest)
    operators = torch.ops.afa_kernels
    opcheck(operators.lora_forward, (base, *branch))
    opcheck(operators.lora_forward_, (base, *branch))
    opcheck(operators.linear_forward, (weight, bias, *branch))
    if save_z:
        saved = (dy, x, a, b, operators.lora_forward(None, *branch)[1], *rest)
        opcheck(operators.lora_backward, (*saved, True, False, True))
        opcheck(operators.linear_backward, (weight, *saved, True, True))
    opcheck(operators.outer, (dy, x, offsets))


def test_every_operator_is_opchecked():
    """A new operator must come with its own opcheck above."""
    schemas = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("afa_kernels::")}
    checked = {
        "lora_forward",
        "lora_forward_",
        "linear_forward",
        "lora_backward",
        "linear_backward",
        "forward_shared",
        "backward_shared",
        "outer",
    }
    assert schemas == {f"afa_kernels::{name}" for name in checked}


def counted(function):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True), counter


def step(problem, alpha_t, **options):
    def function(x, weight, bias, lora_a, lora_b, base):
        y = afa.afa_linear(x, weight, bias, lora_a, lora_b, alpha_t, **options)
        return y + afa.afa_lora(x, lora_a, lora_b, alpha_t, base=base, **options)

    return function


def test_a_moving_alpha_compiles_once():
    alpha_t = torch.tensor(1.0)
    problem = Problem.random(6, 16, 8, 4)
    plain = step(problem, alpha_t)
    compiled, counter = counted(plain)
    for i in range(100):
        alpha_t.fill_(1 - i / 100)
        leaves, expected = problem.leaves(), problem.leaves()
        y = compiled(**leaves)
        y.backward(problem.dy)
        want = plain(**expected)
        want.backward(problem.dy)
        assert torch.equal(y, want)
        for name in leaves:
            torch.testing.assert_close(leaves[name].grad, expected[name].grad)
    assert counter.frame_count == 1


def test_identity_compiles_once_more():
    problem = Problem.random(6, 16, 8, 4)
    alpha_t = torch.tensor(0.5)

    def function(x, weight, bias, lora_a, lora_b, identity):
        return afa.afa_linear(x, weight, bias, lora_a, lora_b, 0.0 if identity else alpha_t)

    compiled, counter = counted(function)
    leaves = problem.leaves()
    arguments = [leaves[n] for n in ("x", "weight", "bias", "lora_a", "lora_b")]
    for _ in range(3):
        compiled(*arguments, False)
    assert counter.frame_count == 1
    for _ in range(3):
        y = compiled(*arguments, True)
    assert counter.frame_count == 2
    torch.testing.assert_close(y, function(*arguments, True))


def test_inplace_is_seen_outside_the_graph():
    problem = Problem.random(6, 16, 8, 4)

    def function(x, lora_a, lora_b, base):
        base = base * 2
        view = base[:3]
        y = afa.afa_lora(x, lora_a, lora_b, 0.5, base=base, inplace=True)
        return y, view.sum()

    compiled, _ = counted(function)
    leaves, expected = problem.leaves(), problem.leaves()
    names = ("x", "lora_a", "lora_b", "base")
    got, want = compiled(*(leaves[n] for n in names)), function(*(expected[n] for n in names))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    (got[0].sum() + got[1]).backward()
    (want[0].sum() + want[1]).backward()
    for name in names:
        torch.testing.assert_close(leaves[name].grad, expected[name].grad)


def test_dropout_draws_a_new_mask_in_every_compiled_call():
    problem = Problem.random(6, 16, 8, 4)
    compiled, counter = counted(step(problem, torch.tensor(0.5), dropout_p=0.5))
    leaves = problem.leaves()
    assert not torch.equal(compiled(**leaves), compiled(**leaves))
    assert counter.frame_count == 1


def test_autocast_inside_the_graph():
    problem = Problem.random(6, 16, 8, 4)

    def function(x, weight, bias, lora_a, lora_b):
        with torch.autocast("cpu", torch.bfloat16):
            return afa.afa_linear(x, weight, bias, lora_a, lora_b, torch.tensor(0.5))

    compiled, _ = counted(function)
    arguments = [problem.leaves()[n] for n in ("x", "weight", "bias", "lora_a", "lora_b")]
    assert torch.equal(compiled(*arguments), function(*arguments))


def test_inductor_agrees():
    """The default compiler, not only the tracer: code around the operators is generated and run."""
    torch._dynamo.reset()
    problem = Problem.random(6, 16, 8, 4)
    plain = step(problem, torch.tensor(0.5))
    leaves, expected = problem.leaves(), problem.leaves()
    y = torch.compile(plain, fullgraph=True)(**leaves)
    y.square().sum().backward()
    want = plain(**expected)
    want.square().sum().backward()
    torch.testing.assert_close(y, want)
    for name in leaves:
        torch.testing.assert_close(leaves[name].grad, expected[name].grad, rtol=1e-4, atol=1e-4)
