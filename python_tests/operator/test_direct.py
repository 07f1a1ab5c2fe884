"""Calls that skip the dispatcher: bit for bit what the operators give, and only where nobody would notice."""

import pytest
import torch
from helpers import Problem
from torch.utils._python_dispatch import TorchDispatchMode

import afa_kernels as afa
from afa_kernels import torch_private
from afa_kernels.operator import ops

pytestmark = pytest.mark.fast

OPTIONS = {"activation": "gelu", "scaling": 1.5}


class Recorder(TorchDispatchMode):
    """Keeps the names of the package's operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == ops.NAMESPACE:
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def problem():
    return Problem.random(9, 24, 20, 4)


def step(p: Problem, x=None) -> list[torch.Tensor]:
    """Return y, dx, dA and dB of a layer."""
    x = (p.x if x is None else x).detach().requires_grad_()
    a, b = p.lora_a.clone().requires_grad_(), p.lora_b.clone().requires_grad_()
    y = afa.afa_linear(x, p.weight, p.bias, a, b, 0.5, **OPTIONS)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), p.dy)]


def calls(p: Problem):
    """Yield the name of each operator and a call that goes to it."""
    ones = torch.ones_like(p.base)
    yield "linear_forward", lambda: afa.afa_linear(p.x, p.weight, None, p.lora_a, p.lora_b, 0.5)
    yield "lora_forward", lambda: afa.afa_lora(p.x, p.lora_a, p.lora_b, 0.5, base=p.base)
    yield "lora_forward_", lambda: afa.afa_lora(p.x, p.lora_a, p.lora_b, 0.5, base=ones, inplace=True)


@pytest.fixture
def no_operators(monkeypatch):
    """Makes every call of an operator an error."""

    def only_direct(function):
        def call(direct, *arguments):
            assert direct, "the dispatcher was used"
            return function(direct, *arguments)

        return call

    for name in ("lora_forward", "lora_forward_", "linear_forward", "lora_backward", "linear_backward"):
        monkeypatch.setattr(ops, name, only_direct(getattr(ops, name)))


def test_ordinary_calls_skip_the_dispatcher(problem, no_operators):
    step(problem)
    for _, call in calls(problem):
        call()
    with torch.inference_mode():
        for _, call in calls(Problem.random(9, 24, 20, 4)):
            call()


def test_the_fixture_would_notice_an_operator(problem, no_operators):
    with Recorder(), pytest.raises(AssertionError, match="the dispatcher was used"):
        step(problem)


def test_a_mode_sees_every_operator_and_changes_no_bit(problem):
    expected = step(problem)
    with Recorder() as recorder:
        got = step(problem)
        for name, call in calls(problem):
            call()
            assert recorder.names[-1] == name
    assert recorder.names[:2] == ["linear_forward", "linear_backward"]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_not_needed_is_absent_either_way(problem, needed):
    def gradients():
        tensors = [t.detach().clone() for t in (problem.x, problem.lora_a, problem.lora_b)]
        wanted = [t.requires_grad_() for t, need in zip(tensors, needed, strict=True) if need]
        y = afa.afa_lora(*tensors, 0.5, **OPTIONS)
        return torch.autograd.grad(y, wanted, problem.dy)

    direct = gradients()
    with Recorder() as recorder:
        watched = gradients()
    assert recorder.names == ["lora_forward", "lora_backward"]
    assert torch.equal(direct[0], watched[0])


def test_a_profile_names_the_operators(problem):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(problem)
    names = {event.key for event in profile.key_averages()}
    assert {"afa_kernels::linear_forward", "afa_kernels::linear_backward"} <= names


@pytest.mark.parametrize(
    "strange",
    [
        pytest.param(lambda x: torch.neg(x)._neg_view(), id="negated lazily"),
        pytest.param(lambda x: x.as_subclass(Subclass), id="subclass"),
    ],
)
def test_strange_tensors_are_seen_by_the_dispatcher(problem, strange):
    x = strange(problem.x)
    assert not torch_private.are_ordinary([x])
    for one, other in zip(step(problem, x), step(problem), strict=True):
        assert torch.equal(one.as_subclass(torch.Tensor), other)


def test_zeros_without_memory(problem):
    zeros = torch._efficientzerotensor(problem.base.shape)
    assert not torch_private.are_ordinary([zeros])
    y = afa.afa_lora(problem.x, problem.lora_a, problem.lora_b, 0.5, base=zeros, **OPTIONS)
    expected = afa.afa_lora(
        problem.x, problem.lora_a, problem.lora_b, 0.5, base=torch.zeros_like(problem.base), **OPTIONS
    )
    assert torch.equal(y, expected)


def test_meta_tensors_have_shapes_only(problem):
    meta = [t.to("meta") for t in (problem.x, problem.weight, problem.lora_a, problem.lora_b)]
    x, weight, a, b = meta
    y = afa.afa_linear(x, weight, None, a, b, 0.5)
    assert y.device.type == "meta"
    assert y.shape == problem.dy.shape


def test_accumulating_counts_as_a_write(problem):
    """A tensor that was saved before it was accumulated into must not be used by a backward."""
    base = problem.base.clone()
    scale = torch.ones_like(base, requires_grad=True)
    product = base * scale
    afa.afa_lora(problem.x, problem.lora_a, problem.lora_b, 0.5, base=base, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_vmap(problem):
    xs = torch.stack([problem.x, 2 * problem.x])
    adapter = (problem.lora_a, problem.lora_b, 0.5)
    ys = torch.vmap(lambda x: afa.afa_lora(x, *adapter))(xs)
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(y, afa.afa_lora(x, *adapter))
