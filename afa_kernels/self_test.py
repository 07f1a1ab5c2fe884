"""``python -m afa_kernels --self-test``: every backend of this machine against float64, in seconds.

It runs what was installed, in the environment where it was installed, without the tests of the repository. A result may
be at most twice as far from float64 as plain torch in the same dtype, plus one rounding.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from afa_kernels.backend import choice
from afa_kernels.operator import ops
from afa_kernels.operator.dropout import threshold_of
from afa_kernels.operator.functional import afa_linear
from afa_kernels.operator.options import Spec

_RESULTS = ("y", "dx", "dA", "dB")


class Case(NamedTuple):
    """One call: sizes, dtype and options. With ``owners`` its rows are sorted by owner, each with its own operands."""

    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype
    alpha_t: float = 0.5
    dropout_p: float = 0.0
    activation: str = "silu"
    owners: int = 0  # or 5
    weights: torch.dtype = torch.float32  # of A and B, where x is not wider

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"M={self.m} K={self.k} N={self.n} r={self.r} {dtype} {self.activation} alpha_t={self.alpha_t}"
        text += f" dropout={self.dropout_p}" if self.dropout_p else ""
        return text + (f" {self.owners} owners" if self.owners else "")


def cases() -> Iterator[Case]:
    """Yield few rows and many, sizes that no tile divides, all dtypes, dropout, identity, and rows by owner."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield Case(1, 64, 96, 8, dtype)
        yield Case(70, 72, 136, 16, dtype, activation="gelu")
        yield Case(257, 200, 120, 5, dtype, alpha_t=0.0)
        yield Case(130, 264, 72, 64, dtype, dropout_p=0.25)
        yield Case(90, 64, 72, 16, dtype, owners=5)
        yield Case(90, 64, 72, 16, dtype, dropout_p=0.25, owners=5)


def _operands(case: Case, device: str | torch.device) -> list[Tensor]:
    """Return x, weight, A and B; A and B are float32 beside 16-bit x, as PEFT has them, or as a case says."""
    generator = torch.Generator().manual_seed(hash(case[:4]) % 2**31)
    wide = torch.promote_types(case.dtype, case.weights)
    own = (case.owners,) if case.owners else ()

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    x, weight = draw(case.m, case.k, dtype=case.dtype), draw(*own, case.n, case.k, dtype=case.dtype)
    a, b = draw(*own, case.r, case.k, dtype=wide), draw(*own, case.n, case.r, dtype=wide)
    return [x, weight, a / case.k**0.5, b / case.r**0.5]


def _results(case: Case, operands: list[Tensor], backend: str) -> list[Tensor]:
    """Return y and the gradients of x, A and B."""
    x, weight, a, b = (t.detach() for t in operands)
    inputs = [t.requires_grad_() for t in (x, a, b)]
    options = {"activation": case.activation, "dropout_p": case.dropout_p, "dropout_seed": 7, "backend": backend}
    if case.owners:
        options["offsets"] = torch.tensor([0, 7, 40, 40, case.m], dtype=torch.int32, device=x.device)
    y = afa_linear(x, weight, None, a, b, case.alpha_t, scaling=2.0, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(1) / case.n)]


def _errors(case: Case, operands: list[Tensor], backend: str, truth: list[Tensor]) -> list[float]:
    results = _results(case, operands, backend)
    return [float((got.double() - t).norm() / t.norm()) for got, t in zip(results, truth, strict=True)]


def failures_of(case: Case, backend: str, device: str | torch.device) -> list[str]:
    """Return a line for each result that is too far from float64."""
    operands = _operands(case, device)
    # The operands of the truth have the values that a call in the dtype of x computes with.
    truth = _results(case, [t.to(case.dtype).double() for t in operands], "reference")
    # Half a unit in the last place, on average; a whole one of few elements.
    roundings = [torch.finfo(case.dtype).eps / (1 if t.numel() < 256 else 2) for t in truth]
    plain = _errors(case, operands, "torch", truth)
    allowed = [2 * error + rounding for error, rounding in zip(plain, roundings, strict=True)]
    found = zip(_RESULTS, _errors(case, operands, backend, truth), allowed, strict=True)
    return [
        f"{case}: {name} is {error:.1e} from float64, allowed {most:.1e}"
        for name, error, most in found
        if not error <= most  # NaN fails
    ]


def _takes(case: Case, backend: str, device: str) -> bool:
    x, _, _, b = _operands(case, device)
    spec = Spec(case.activation, 1.0, threshold_of(case.dropout_p))
    return choice.get(backend).why_not(ops.call_of(x, b, spec)) is None


def run() -> int:
    """Print a line for each backend and return the exit status: 1 where a result is too far from float64."""
    failed = 0
    for name, status in choice.backends().items():
        backend = choice.get(name)
        if not status or not backend.automatic:
            continue
        devices = [d for d in ("cpu", "cuda") if not backend.devices or d in backend.devices]
        for device in devices:
            if device == "cuda" and not torch.cuda.is_available():
                continue
            begin = time.perf_counter()
            taken = [case for case in cases() if _takes(case, name, device)]
            failures = [line for case in taken for line in failures_of(case, name, device)]
            failed += len(failures)
            state = f"{len(failures)} results are wrong" if failures else "ok"
            print(f"{name:<10} on {device}: {state}; {len(taken)} calls, {time.perf_counter() - begin:.1f} s")
            for line in failures:
                print(f"  {line}")
    return 1 if failed else 0
