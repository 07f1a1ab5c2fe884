"""The backend of a call is chosen once: the one that runs the forward runs the backward, wherever that happens."""

import threading

import pytest
import torch
from helpers import Problem, altered

import afa_kernels as afa
from afa_kernels.backend import choice

pytestmark = pytest.mark.fast


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that were called since, with the direction."""
    seen = []

    def recorded(backend, direction):
        function = getattr(backend, direction)

        def call(*arguments, **options):
            seen.append((direction, backend.name))
            return function(*arguments, **options)

        return call

    for name in ("cpu", "torch", "reference"):
        backend = choice.get(name)
        spy = {direction: recorded(backend, direction) for direction in ("forward", "backward")}
        monkeypatch.setitem(choice._BACKENDS, name, altered(backend, **spy))
    choice.forget_choices()
    yield seen
    choice.forget_choices()


def loss_of(problem: Problem, alpha_t=0.5, **options) -> torch.Tensor:
    leaves = problem.leaves()
    operands = [leaves[name] for name in ("x", "weight", "bias", "lora_a", "lora_b")]
    return afa.afa_linear(*operands, alpha_t, **options).sum()


def shared_loss(problem: Problem, alpha_t=0.5) -> torch.Tensor:
    layers = [afa.AFALinear(torch.nn.Linear(24, n), r=4) for n in (16, 20)]
    for layer in layers:
        layer.set_alpha_t(alpha_t)
    return sum(y.sum() for y in afa.AFASharedInput(layers)(problem.x))


@pytest.mark.parametrize("loss", [loss_of, shared_loss])
@pytest.mark.parametrize("alpha_t", [0.5, 0.0])
def test_use_backend_holds_for_the_backward_after_its_block(calls, loss, alpha_t):
    with afa.use_backend("reference"):
        y = loss(Problem.random(5, 24, 20, 4), alpha_t)
    y.backward()
    assert {direction for direction, _ in calls} == {"forward", "backward"}
    assert {name for _, name in calls} == {"reference"}


@pytest.mark.parametrize("loss", [loss_of, shared_loss])
def test_use_backend_around_the_backward_alone_changes_nothing(calls, loss):
    y = loss(Problem.random(5, 24, 20, 4))
    expected = {name for _, name in calls}
    with afa.use_backend("reference"):
        y.backward()
    assert {name for _, name in calls} == expected
    assert "reference" not in expected


def test_the_backward_may_run_on_another_thread(calls):
    """As those of autograd do for the graphs of GPUs."""
    with afa.use_backend("reference"):
        y = loss_of(Problem.random(5, 24, 20, 4))
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert calls == [("forward", "reference"), ("backward", "reference")]


def test_a_request_holds_on_its_own_thread_only(calls):
    def run():
        loss_of(Problem.random(5, 24, 20, 4))

    with afa.use_backend("reference"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert ("forward", "reference") not in calls and len(calls) == 1


def test_an_environment_variable_holds_for_the_backward_too(calls, monkeypatch):
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "reference")
    y = loss_of(Problem.random(5, 24, 20, 4))
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE)
    y.backward()
    assert calls == [("forward", "reference"), ("backward", "reference")]


def test_compiled_code_follows_the_request_and_keeps_it_for_the_backward(calls):
    torch._dynamo.reset()
    compiled = torch.compile(afa.afa_linear, backend="aot_eager", fullgraph=True)
    leaves = Problem.random(5, 24, 20, 4).leaves()
    operands = [leaves[name] for name in ("x", "weight", "bias", "lora_a", "lora_b")]
    alpha_t = torch.tensor(0.5)
    with afa.use_backend("reference"):
        y = compiled(*operands, alpha_t)
    y.sum().backward()
    assert calls == [("forward", "reference"), ("backward", "reference")]
    calls.clear()
    compiled(*operands, alpha_t).sum().backward()
    assert len({name for _, name in calls}) == 1 and ("forward", "reference") not in calls


def test_watched_operators_carry_the_choice(calls):
    """Through the dispatcher, which a profiler brings about, the name of the backend is an argument."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        with afa.use_backend("reference"):
            y = loss_of(Problem.random(5, 24, 20, 4))
        y.backward()
    assert calls == [("forward", "reference"), ("backward", "reference")]
