"""What a random call is made of: whose rows are whose, and the operands of one result."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from afa_kernels.backend.interface import Rows
from afa_kernels.operator.activation import IDENTITY
from afa_kernels.operator.options import Spec
from conformance.layouts import placed


@dataclass
class Output:
    """One result and what makes it beside x: the operands of :meth:`Backend.forward`."""

    a: Tensor
    b: Tensor
    alpha_t: Tensor | None
    spec: Spec
    base: Tensor | None
    accumulates: bool  # into the base
    dy: Tensor
    layout: str = "packed"  # of the result


def random_rows(draw: random.Random, rows: int, owners: int, rank: int) -> Rows:
    rows -= draw.choice((0, 0, 0, min(rows, 3), rows // 2, rows))
    kind = draw.choice(("even", "skewed", "random"))
    ends = [rows // owners * (g + 1) for g in range(owners)]
    if kind == "skewed":  # one owner has nearly all rows
        most = draw.randrange(owners)
        ends = [0 if g < most else rows for g in range(owners)]
    if kind == "random":  # some have none
        ends = sorted(draw.randint(0, rows) for _ in range(owners))
    ranks = torch.tensor([[draw.choice((0, 1, rank, draw.randint(0, rank))), -1] for _ in range(owners)])
    scaling = torch.tensor([draw.choice((0.5, 1.75, -2.0)) for _ in range(owners)])
    return Rows(
        torch.tensor(ends, dtype=torch.int32),
        ranks.int()[:, 0] if draw.random() < 0.5 else None,
        scaling if draw.random() < 0.5 else None,
    )


def normal(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)  # float64 takes twice as long to draw
    return (torch.randn(*shape, dtype=wide) * scale).to(dtype)


def output(
    dtype: torch.dtype, m: int, k: int, n: int, r: int, rows: Rows | None, *, weights: torch.dtype, dropout: int = 0,
    activation: str = "silu", alphas=(0.3,), scaling: float = 1.5, base: str = "matrix", one_dy: bool = False,
    layouts=("packed",) * 5,
) -> Output:  # fmt: skip
    """Return what makes one result, with the layouts of A, B, the base, dy and the result. ``alphas`` go round the
    owners; A and B are never 0, with which any kernel is right, and ``one_dy`` is for all rows."""
    owners, behind = (), slice(m, m)
    if rows is not None:
        owners, behind = (len(rows.offsets),), slice(int(rows.offsets[-1]), m)
    a, b = normal(weights, *owners, r, k, scale=k**-0.5), normal(weights, *owners, n, r, scale=r**-0.5)
    if rows is not None and rows.ranks is not None:
        for g, rank in enumerate(rows.ranks.tolist()):
            a[g, rank:], b[g, :, rank:] = torch.nan, torch.nan
    alpha_t = None
    if activation != IDENTITY:
        alpha_t = torch.tensor(alphas[0])
        if owners:
            each = [alphas[g % len(alphas)] for g in range(*owners)]
            alpha_t = alpha_t.expand(owners) if len(alphas) == 1 else torch.tensor(each)
    whole, dy = normal(dtype, m, n), normal(dtype, m, n)
    if one_dy and behind.start == m:
        dy = dy[:1].clone().expand(m, n)
    else:
        dy[behind] = torch.nan
        dy = placed(dy, layouts[3])
    whole = whole[:1].clone().expand(m, n) if base == "row" else placed(whole, layouts[2])
    return Output(
        placed(a, layouts[0]), placed(b, layouts[1]), alpha_t, Spec(activation, scaling, dropout),
        None if base == "none" else whole, base == "accumulated", dy, layouts[4],
    )  # fmt: skip
