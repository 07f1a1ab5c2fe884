"""The operands of a case, and their truth in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from afa_kernels.operator.activation import phi, phi_slope
from bench.shapes import DTYPES, Case

SCALING = 2.0
_CHECKED_ROWS = 64
_CHUNK = 4096  # rows that are widened to float64 at a time


@dataclass
class Problem:
    """``x (M, K)``, ``weight (N, K)``, ``bias (N,)`` or None, ``lora_a (r, K)``, ``lora_b (N, r)``,
    ``base`` and ``dy (M, N)``. A and B are never 0: with B = 0 any kernel would be right."""

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    base: Tensor
    dy: Tensor

    @staticmethod
    def of(case: Case, seed: int = 0) -> "Problem":
        generator = torch.Generator(device=case.device).manual_seed(seed)
        dtype, adapter = DTYPES[case.dtype], DTYPES[case.adapter_dtype]

        def draw(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            wide = torch.float64 if to == torch.float64 else torch.float32
            t = torch.empty(shape, dtype=wide, device=case.device)
            return t.normal_(generator=generator).mul_(scale).to(to)

        m, k, n, r = case.m, case.k, case.n, case.r
        return Problem(
            case=case,
            x=draw(m, k),
            weight=draw(n, k, scale=k**-0.5),
            bias=draw(n) if case.bias else None,
            lora_a=draw(r, k, scale=k**-0.5, to=adapter),
            lora_b=draw(n, r, scale=r**-0.5, to=adapter),
            base=draw(m, n) if case.scope == "branch" else draw(0, n),
            dy=draw(m, n),
        )


def checked_rows(m: int) -> Tensor:
    """Return the rows of y and dx that are compared: all, or the ends of M and an even sample."""
    return torch.linspace(0, m - 1, min(m, _CHECKED_ROWS), dtype=torch.float64).long()


def truth(problem: Problem, function: str) -> dict[str, Tensor]:
    """Return ``y`` and ``dx`` at :func:`checked_rows`, and the whole ``da`` and ``db``, in float64.

    ``function`` is "frozen" (no branch), "lora" (``phi(z) = z``) or "afa". The frozen product is
    formed for the checked rows alone; the weight gradients, which depend on every row, only need
    products of rank r, and are summed over chunks of rows.
    """
    case, wide = problem.case, torch.float64
    rows = checked_rows(case.m).to(problem.x.device)
    result = {
        "y": torch.zeros(len(rows), case.n, dtype=wide, device=rows.device),
        "dx": torch.zeros(len(rows), case.k, dtype=wide, device=rows.device),
    }
    x, dy = problem.x[rows].to(wide), problem.dy[rows].to(wide)
    if case.scope == "branch":
        result["y"] += problem.base[rows].to(wide)
    else:
        weight = problem.weight.to(wide)
        result["y"] += x @ weight.T
        result["dx"] += dy @ weight
        if problem.bias is not None:
            result["y"] += problem.bias.to(wide)
    if function == "frozen":
        return result
    alpha_t = case.alpha_t if function == "afa" else 0.0
    # A and B are rounded to the dtype of x, as autocast and every provider here do.
    a = problem.lora_a.to(problem.x.dtype).to(wide)
    b = problem.lora_b.to(problem.x.dtype).to(wide)

    def branch(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        z = x @ a.T
        dz = SCALING * (dy @ b) * phi_slope(z, alpha_t, case.activation)
        return phi(z, alpha_t, case.activation), dz

    h, dz = branch(x, dy)
    result["y"] += SCALING * h @ b.T
    result["dx"] += dz @ a
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for first in range(0, case.m, _CHUNK):
        x = problem.x[first : first + _CHUNK].to(wide)
        dy = problem.dy[first : first + _CHUNK].to(wide)
        h, dz = branch(x, dy)
        da += dz.T @ x
        db += SCALING * dy.T @ h
    return result | {"da": da, "db": db}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return ``‖got - expected‖ / ‖expected‖``; infinite where ``got`` is not finite."""
    error = (got.to(torch.float64) - expected).norm() / expected.norm().clamp_min(1e-300)
    return error.item() if torch.isfinite(error) else float("inf")
