"""The rows of the scope "grouped": forward and backward of each provider, checked against float64 and timed."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import rows
from bench.cost import Cost
from bench.entrants import enter
from bench.grouped import Call, Operands, plain
from bench.memory import Memory, memory_of
from bench.problem import relative_error
from bench.providers import Provider
from bench.runner import Check, compared
from bench.shapes import DTYPES, Case, experts
from bench.suite import FROZEN, Options
from bench.timing import Work, clock_of, measure


class Step:
    """Forward and backward of a function of x, A and B; the frozen experts have a gradient of x alone."""

    def __init__(self, o: Operands, call: Call, frozen: bool):
        self.weight, self.dy, self.call = o.weight, o.dy, call
        self.operands = [t.detach().requires_grad_() for t in (o.x, o.lora_a, o.lora_b)]
        self.inputs = self.operands[:1] if frozen else self.operands

    def forward(self, state: None = None) -> Tensor:
        return self.call(*self.operands)

    def backward(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return y, torch.autograd.grad(y, self.inputs, self.dy.to(y.dtype))

    def results(self) -> dict[str, Tensor]:
        y, gradients = self.backward(self.forward())
        return {"y": y.detach()} | dict(zip(("dx", "da", "db"), gradients, strict=False))

    def memory(self) -> Memory:
        operands = (*self.operands, self.weight, self.dy)
        return memory_of(self.forward, lambda: self.backward(self.forward()), operands, str(self.dy.device))


def run_case(
    case: Case,
    chosen: dict[str, Provider],
    options: Options,
    roof: dict[str, object],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, object]]:
    """Yield the rows of each provider, and why a provider is absent or wrong."""
    o = Operands.of(case)
    # A mask is random and differs between providers: accuracy is that of the call without it.
    unmasked = Operands.of(case._replace(dropout=0.0)) if case.dropout else o
    references: dict[str, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def checked(provider: Provider) -> tuple[Step, Check]:
        frozen = provider.function == FROZEN
        if provider.function not in references:
            references[provider.function] = _reference(unmasked, provider.function, frozen)
        got = Step(unmasked, provider.grouped(unmasked), frozen).results()
        check = compared(got, *references[provider.function], o.x.dtype)
        return Step(o, provider.grouped(o), frozen), check

    entrants = yield from enter(case, chosen, checked, Step.memory, say)
    references.clear()
    works = {name: Work(lambda: None, {"forward": e.step.forward, "backward": e.step.backward}, "both")
             for name, e in entrants.items()}  # fmt: skip
    if not works:
        return
    say(f"timing {', '.join(works)}")
    rounds = measure(works, clock_of(case.device, options.clock), options.seconds, options.precision)
    for step in next(iter(works.values())).samples:
        for name, entrant in entrants.items():
            least = _least(case, step, entrant.provider.function == FROZEN)
            row = rows.row(case, step, entrant.provider, works, least, entrant.check, entrant.memory, roof)
            row |= {"cache": "hot", "launch": "eager", "rounds": rounds}
            if FROZEN in works and entrant.provider.function != FROZEN:
                row |= rows.tax(works[name].samples[step], works[FROZEN].samples[step])
            yield row


def _reference(o: Operands, function: str, frozen: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the results in float64, and how far torch in the dtype of x is from them."""
    truth, same = (Step(o, plain(o, function, dtype), frozen).results() for dtype in (torch.float64, o.x.dtype))
    return truth, {name: relative_error(same[name], value) for name, value in truth.items()}


def _least(case: Case, step: str, frozen: bool) -> Cost:
    """Return the arithmetic of a step, and the bytes of its large operands."""
    m, k, n, r, count = case.m, case.k, case.n, case.r, experts(case.layer).count
    size = DTYPES[case.dtype].itemsize
    ranks = 0 if frozen else r
    forward = Cost(2 * m * (k * n + ranks * (k + n)), size * (m * (k + n) + count * (k * n + ranks * (k + n))))
    backward = Cost(forward.flop + 2 * m * ranks * (k + n), forward.nbytes + size * (m * k + count * ranks * (k + n)))
    return {"forward": forward, "backward": backward, "both": forward + backward}[step]
