"""The scope "experts": frozen experts with an adapter each, on rows that are sorted by expert.

A provider turns the operands into a function of x, A and B. ``frozen``, over which taxes are counted, is torch's
``grouped_mm`` with the frozen weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_kernels
from afa_kernels import torch_private
from afa_kernels.operator.activation import ACTIVATIONS
from bench.cost import Cost
from bench.memory import Memory, memory_of
from bench.problem import SCALING, relative_error
from bench.providers import Provider, runs
from bench.runner import Check, compared
from bench.shapes import DTYPES, Case, experts

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, A, B -> y


@dataclass
class Operands:
    """``x (M, K)``, ``weight (E, N, K)``, ``lora_a (E, r, K)``, ``lora_b (E, N, r)``, ``dy (M, N)``; the rows of each
    expert end at its offset."""

    case: Case
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    offsets: Tensor

    @staticmethod
    def of(case: Case) -> "Operands":
        generator = torch.Generator(device=case.device).manual_seed(0)
        dtype, adapter = DTYPES[case.dtype], DTYPES[case.adapter_dtype]
        shape = experts(case.layer)

        def draw(*sizes: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(sizes, generator=generator, device=case.device).mul_(scale).to(to)

        m, k, n, r, e = case.m, case.k, case.n, case.r, shape.count
        return Operands(
            case,
            draw(m, k),
            draw(e, n, k, scale=k**-0.5),
            draw(e, r, k, scale=k**-0.5, to=adapter),
            draw(e, n, r, scale=r**-0.5, to=adapter),
            draw(m, n),
            torch.tensor(shape.rows(m), device=case.device).cumsum(0).to(torch.int32),
        )

    def runs(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            yield expert, slice(start, end)
            start = end


def plain(o: Operands, function: str, dtype: torch.dtype) -> Call:
    """Return ``function`` ("frozen", "lora" or "afa") in torch ops, expert by expert, in ``dtype``: the truth in
    float64, else the yardstick."""
    alpha_t = o.case.alpha_t if function == "afa" else 0.0
    act = ACTIVATIONS[o.case.activation].value

    def call(x, a, b):
        pieces = []
        for expert, rows in o.runs():
            y = x[rows].to(dtype) @ o.weight[expert].to(dtype).T
            if function != "frozen":
                z = x[rows].to(dtype) @ a[expert].to(o.x.dtype).to(dtype).T
                h = (1 - alpha_t) * z + alpha_t * act(z)
                y = y + SCALING * h @ b[expert].to(o.x.dtype).to(dtype).T
            pieces.append(y)
        return torch.cat(pieces)

    return call


class Step:
    """Forward and backward of a function of x, A and B; the frozen experts have a gradient of x alone."""

    def __init__(self, o: Operands, call: Call, function: str):
        self.case, self.weight, self.dy, self.call = o.case, o.weight, o.dy, call
        self.operands = [t.detach().requires_grad_() for t in (o.x, o.lora_a, o.lora_b)]
        self.inputs = self.operands[:1] if function == "frozen" else self.operands

    def prepare(self) -> None:
        pass

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

    def least(self, step: str) -> Cost:
        """Return the arithmetic of "forward", "backward" or "both", and the bytes of the large operands."""
        m, k, n, count = self.case.m, self.case.k, self.case.n, len(self.weight)
        size, ranks = self.weight.element_size(), self.case.r if len(self.inputs) > 1 else 0
        forward = Cost(2 * m * (k * n + ranks * (k + n)), size * (m * (k + n) + count * (k * n + ranks * (k + n))))
        flop, nbytes = forward.flop + 2 * m * ranks * (k + n), forward.nbytes + size * (m * k + count * ranks * (k + n))
        backward = Cost(flop, nbytes)
        return {"forward": forward, "backward": backward, "both": forward + backward}[step]


def checking(case: Case) -> Callable[[Provider], tuple[Step, Check]]:
    """Return what makes the step of a provider and compares its output and gradients with float64, beside plain torch
    in the same dtype."""
    o = Operands.of(case)
    # A mask is random and differs between providers: accuracy is that of the call without it.
    unmasked = Operands.of(case._replace(dropout=0.0)) if case.dropout else o

    @cache
    def reference(function: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        truth, same = (
            Step(unmasked, plain(unmasked, function, dtype), function).results() for dtype in (torch.float64, o.x.dtype)
        )
        return truth, {name: relative_error(same[name], value) for name, value in truth.items()}

    def checked(provider: Provider) -> tuple[Step, Check]:
        got = Step(unmasked, provider.experts(unmasked), provider.function).results()
        check = compared(got, *reference(provider.function), o.x.dtype)
        return Step(o, provider.experts(o), provider.function), check

    return checked


def _frozen(o: Operands) -> Call:
    return lambda x, a, b: torch_private.grouped_mm(x, o.weight.mT, o.offsets)


def _pair(o: Operands) -> Call:
    def call(x, a, b):
        dropped = F.dropout(x, o.case.dropout) if o.case.dropout else x
        z = torch_private.grouped_mm(dropped, a.to(x.dtype).mT, o.offsets)
        y = torch_private.grouped_mm(x, o.weight.mT, o.offsets)
        return y + torch_private.grouped_mm(z, (SCALING * b).to(x.dtype).mT, o.offsets)

    return call


def _padded(o: Operands) -> Call:
    """Every expert gets as many rows as the fullest one."""
    ends = o.offsets.long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    most = int(counts.max())
    expert = torch.repeat_interleave(torch.arange(len(counts), device=ends.device), counts)
    place = expert * most + torch.arange(o.case.m, device=ends.device) - (ends - counts)[expert]

    def call(x, a, b):
        batch = x.new_zeros(len(counts) * most, x.shape[1]).index_copy(0, place, x).view(len(counts), most, -1)
        dropped = F.dropout(batch, o.case.dropout) if o.case.dropout else batch
        z = torch.bmm(dropped, a.to(x.dtype).mT)
        y = torch.baddbmm(torch.bmm(batch, o.weight.mT), z, b.to(x.dtype).mT, alpha=SCALING)
        return y.flatten(0, 1)[place]

    return call


def _peft(o: Operands) -> Call:
    """What PEFT's ParamWrapper does: a parametrization of the weights of all experts."""

    def call(x, a, b):
        delta = torch.einsum("enr,erk->enk", b, a) * SCALING
        return torch_private.grouped_mm(x, (o.weight + delta.to(x.dtype)).mT, o.offsets)

    return call


def _loop(o: Operands) -> Call:
    options = {"activation": o.case.activation, "scaling": SCALING, "dropout_p": o.case.dropout}

    def call(x, a, b):
        return torch.cat([
            afa_kernels.afa_linear(x[rows], o.weight[e], None, a[e], b[e], o.case.alpha_t, **options)
            for e, rows in o.runs()
        ])  # fmt: skip

    return call


def _afa(backend: str | None) -> Callable[[Operands], Call]:
    def of(o: Operands) -> Call:
        options = {"activation": o.case.activation, "scaling": SCALING, "dropout_p": o.case.dropout}
        alpha_t = o.case.alpha_t and torch.tensor(o.case.alpha_t, device=o.x.device)
        return lambda x, a, b: afa_kernels.afa_linear(
            x, o.weight, None, a, b, alpha_t, offsets=o.offsets, **options, backend=backend
        )

    return of


def _grouped_mm_why_not(case: Case) -> str | None:
    return None if torch_private.has_grouped_mm() else "this torch has no grouped_mm"


def _peft_why_not(case: Case) -> str | None:
    return "refuses dropout on expert weights" if case.dropout else _grouped_mm_why_not(case)


def providers() -> dict[str, Provider]:
    """Return the providers of this scope by name; ``experts`` of each makes its function from the operands."""
    rows = (
        ("frozen", "grouped_mm with the frozen weights", "frozen", _grouped_mm_why_not, _frozen, False),
        ("frozen.again", "frozen measured again", "frozen", _grouped_mm_why_not, _frozen, False),
        ("grouped_mm", "a pair of grouped_mm beside it", "lora", _grouped_mm_why_not, _pair, False),
        ("baddbmm", "batched products of padded rows", "lora", runs, _padded, False),
        ("peft", "PEFT's way for experts: W + dW of all of them", "lora", _peft_why_not, _peft, False),
        ("afa.loop", "afa_linear, expert by expert", "afa", runs, _loop, True),
        ("afa.torch", "afa_linear by owner, backend torch", "afa", runs, _afa("torch"), True),
        ("afa", "afa_linear by owner", "afa", runs, _afa(None), True),
        ("afa.again", "afa measured again", "afa", runs, _afa(None), True),
    )
    return {
        name: Provider(name, about, function, why_not, None, experts=make, ours=ours)
        for name, about, function, why_not, make, ours in rows
    }
