"""The step of gpu_check on rows sorted by owner: every backend of the device that takes them against float64."""

import functools
import itertools

import torch
from torch import Tensor

import afa_kernels as afa
from afa_kernels.backend import choice
from tools.gpu_steps import Context, Outcome, Step

_WHAT = ("y", "dx", "dA", "dB")
# Rows of each owner, K, N, r: as many for each, one that has most of them, some without rows.
_LARGE = [
    (sizes, 1024, 1536, r)
    for r in (8, 16, 32, 64, 128)
    for sizes in ([512] * 16, [6000, 1, 0, 700, 64, 0, 65, 1300], [3] * 100 + [0] * 28)
]
_SMALL = [([40, 0, 33], 72, 136, 16), ([3, 70], 136, 72, 64)]


def step(
    case: tuple, device: str, backend: str, dtype: torch.dtype, dropout_p: float = 0.1, *, frozen: bool = False
) -> tuple[Tensor, ...]:
    """Return y, dx, dA and dB of a call in ``dtype`` on operands that bfloat16 holds.

    ``frozen``: with a weight for each owner, so that the kernels add to its products.
    """
    sizes, k, n, r = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16().to(device, dtype)

    rows, owners = sum(sizes), len(sizes)
    x, a, b = draw(rows, k), draw(owners, r, k, scale=k**-0.5), draw(owners, n, r, scale=r**-0.5)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    base, dy = draw(rows, n), draw(rows, n)
    offsets = torch.tensor(sizes, device=device).cumsum(0).int()
    alpha_t = torch.linspace(0, 1, owners, device=device)
    ranks = torch.tensor([max(1, r - g % 4) for g in range(owners)], dtype=torch.int32, device=device)
    options = {"scaling": 1.5, "dropout_p": dropout_p, "dropout_seed": 11, "ranks": ranks, "backend": backend}
    if frozen:
        weight = draw(owners, n, k, scale=k**-0.5)
        y = afa.afa_linear(x, weight, None, a, b, alpha_t, offsets=offsets, **options)
    else:
        y = afa.afa_lora(x, a, b, alpha_t, offsets=offsets, base=base, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def check_by_owner(context: Context) -> Outcome:
    """Compare with float64, to twice the error of torch in the same dtype plus one rounding, and each backend with
    itself."""
    backends = [name for name in context.backends if choice.get(name).takes_owners]
    if not backends:
        return Outcome.absent(f"none of {', '.join(context.backends)} takes rows sorted by owner")
    rows = []
    for case, frozen in itertools.product(_SMALL if context.small else _LARGE, (False, True)):
        here = functools.partial(step, case, context.device, dtype=torch.bfloat16, frozen=frozen)
        # On the CPU: torch has no grouped_mm in float64.
        truth = [t.to(context.device) for t in step(case, "cpu", "reference", torch.float64, frozen=frozen)]
        plain = [_error(*pair) for pair in zip(here("torch"), truth, strict=True)]
        for backend in backends:
            for what, value, same, exact, error in zip(_WHAT, here(backend), here(backend), truth, plain, strict=True):
                rows.append({
                    "owners": len(case[0]), "rows": sum(case[0]), "r": case[3], "frozen": frozen, "backend": backend,
                    "what": what, "error": float(f"{_error(value, exact):.2e}"),
                    "allowed": float(f"{2 * error + torch.finfo(torch.bfloat16).eps / 2:.2e}"),
                    "same bits twice": torch.equal(value, same),
                })  # fmt: skip
    wrong = [row for row in rows if not row["error"] <= row["allowed"] or not row["same bits twice"]]
    message = f"{len(rows) - len(wrong)} of {len(rows)} as accurate as torch, and repeat"
    return Outcome.failed(message, wrong) if wrong else Outcome.ok(message, rows)


def _error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


STEPS = (
    Step("by_owner", "rows sorted by owner: every backend against float64, twice for the same bits", check_by_owner),
)
