"""One provider on one problem: its calls, and the check against float64."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.problem import Problem, checked_rows, relative_error, truth
from bench.providers import EagerLayer, Provider, eager_branch


@dataclass
class Runner:
    """Calls of one provider. ``inputs`` are what gradients are taken of: x, then A and B if any."""

    problem: Problem
    module: nn.Module | None
    function: object
    x: Tensor
    adapter: tuple[Tensor, ...]
    inplace: bool = False  # whether a branch writes into its base

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x, *self.adapter)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        problem = self.problem
        bias = () if problem.bias is None else (problem.bias,)
        return (*self.inputs, problem.weight, problem.base, problem.dy, *bias)

    def prepare(self) -> Tensor | None:
        """Return the base of a branch; a fresh copy, if the branch writes into it."""
        if self.module is not None:
            return None
        return self.problem.base.clone() if self.inplace else self.problem.base

    def forward(self, base: Tensor | None) -> Tensor:
        if self.module is not None:
            return self.module(self.x)
        return self.function(self.x, *self.adapter, base)

    def backward(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # y is handed on, so that it is not freed within this step's time.
        return y, torch.autograd.grad(y, self.inputs, self.problem.dy)

    def inference(self, base: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self.forward(base)

    def results(self) -> dict[str, Tensor]:
        """Return y, dx, da and db (the last two if there is an adapter), y and dx at the rows that
        are checked."""
        y, gradients = self.backward(self.forward(self.prepare()))
        rows = checked_rows(self.problem.case.m).to(y.device)
        named = dict(zip(("dx", "da", "db"), gradients, strict=False))
        return named | {"y": y.detach()[rows], "dx": named["dx"][rows]}


def build(provider: Provider, problem: Problem, *, inplace: bool = False) -> Runner:
    """Return the calls of ``provider``. A branch gives a new result, as ``afa_lora`` does unless told otherwise, or
    with ``inplace`` writes into its base, where it can."""
    case = problem.case
    x = problem.x.detach().requires_grad_()
    a, b = problem.lora_a.detach().clone(), problem.lora_b.detach().clone()
    if case.scope == "branch":
        adapter = (a.requires_grad_(), b.requires_grad_())
        return Runner(problem, None, provider.branch(case, inplace), x, adapter, inplace)
    module, adapter = provider.layer(frozen_linear(problem), a, b, case)
    return Runner(problem, module, None, x, adapter)


def frozen_linear(problem: Problem) -> nn.Linear:
    n, k = problem.weight.shape
    linear = nn.Linear(k, n, bias=problem.bias is not None, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        linear.bias = nn.Parameter(problem.bias, requires_grad=False)
    return linear


@dataclass
class Checker:
    """Compares results with float64; the yardstick is plain torch in the same dtype, computing the
    same function."""

    problem: Problem

    def __post_init__(self):
        self._references: dict[str, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def _reference(self, function: str):
        if function not in self._references:
            expected = truth(self.problem, function)
            plain = self._plain(function).results()
            errors = {name: relative_error(plain[name], expected[name]) for name in expected}
            self._references[function] = expected, errors
        return self._references[function]

    def _plain(self, function: str) -> Runner:
        problem, case = self.problem, self.problem.case
        x = problem.x.detach().requires_grad_()
        a, b = (t.detach().clone().requires_grad_() for t in (problem.lora_a, problem.lora_b))
        alpha_t = case.alpha_t if function == "afa" else 0.0
        if case.scope == "branch":

            def branch(x, a, b, base):
                return eager_branch(x, a, b, base, alpha_t, case.activation)

            return Runner(problem, None, branch, x, (a, b))
        linear = frozen_linear(problem)
        if function == "frozen":
            return Runner(problem, linear, None, x, ())
        module = EagerLayer(linear, a.detach(), b.detach(), case, alpha_t)
        return Runner(problem, module, None, x, (module.lora_a, module.lora_b))

    def check(self, runner: Runner, function: str) -> "Check":
        expected, plain = self._reference(function)
        return compared(runner.results(), expected, plain, runner.problem.x.dtype)


class Check(NamedTuple):
    """Accuracy against float64: the largest relative error of y and the gradients, the largest
    ratio of one to plain torch's (to one rounding, where torch is better), and the verdict."""

    error: float
    ratio: float
    right: bool


def compared(got: dict[str, Tensor], expected: dict[str, Tensor], plain: dict[str, float], dtype: torch.dtype) -> Check:
    """Return the check of ``got`` against float64, beside the errors of plain torch."""
    # One rounding of the result; float64 has no wider truth, which rounds as often as it does.
    rounding = torch.finfo(dtype).eps * (64.0 if dtype == torch.float64 else 0.5)
    errors = {name: relative_error(got[name], value) for name, value in expected.items()}
    return Check(
        error=max(errors.values()),
        ratio=max(error / max(plain[name], rounding) for name, error in errors.items()),
        right=all(error <= 2 * plain[name] + rounding for name, error in errors.items()),
    )
