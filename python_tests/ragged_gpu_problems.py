"""Random calls of the ragged operator, each drawn from a number and compared with float64, group by group.

Empty groups, one that has most of the rows, rows behind the last offset, ranks with NaN beyond them, an alpha_t and a
scaling for all groups or for each, dropout, layouts with NaN between what belongs to an operand, subsets of gradients.
"""

import functools
import random

import torch
from helpers import (
    DTYPES,
    ORDERS,
    Problem,
    allowed_error,
    assert_as_accurate_as_torch,
    eager,
    mask_and_p,
    relative_error,
    run,
)
from ptx_problems import INPUTS, LAYOUTS
from torch import Tensor

import afa_kernels as afa
from afa_kernels.operator.activation import ACTIVATIONS

SEED = 77

# How the matrices of all groups may lie in memory, beside one matrix as in LAYOUTS.
STACKS = {
    "packed": lambda t: t,
    "rows apart": lambda t: torch.cat([t, t.new_full((*t.shape[:2], 8), torch.nan)], 2)[..., : t.shape[2]],
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "groups fastest": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every other group": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(0, 1)[::2],
}


def sizes_of_groups(draw: random.Random, rows: int) -> list[int]:
    """Return the rows of each group: all ``rows`` together, or fewer."""
    groups = draw.choice((1, 2, 3, 5))
    rows -= draw.choice((0, 0, 0, min(rows, 3), rows // 2, rows))
    kind = draw.choice(("even", "skewed", "random"))
    if kind == "even":
        return [rows // groups] * groups
    if kind == "skewed":  # one group has nearly all rows
        sizes = [draw.randint(0, 1) for _ in range(groups)]
        sizes[draw.randrange(groups)] = max(0, rows - groups)
        return sizes if sum(sizes) <= rows else [rows] + [0] * (groups - 1)
    cuts = sorted(draw.randint(0, rows) for _ in range(groups - 1))  # some are empty
    return [end - first for first, end in zip([0, *cuts], [*cuts, rows], strict=True)]


class RaggedProblem:
    def __init__(
        self, number: int, rows: int, columns: int, ranks: tuple[int, ...], *, backend: str = "triton",
        dtypes: tuple[str, ...] = tuple(sorted(DTYPES)),
    ):  # fmt: skip
        self.number, self.backend = number, backend
        self.draw = draw = random.Random(number)
        self.dtype = DTYPES[dtypes[number % len(dtypes)]]
        self.activation = sorted(ACTIVATIONS)[number % len(ACTIVATIONS)]
        rows = draw.choice((1, rows // 3, rows, draw.randint(1, rows)))
        self.sizes = sizes_of_groups(draw, rows)
        self.t, self.g = rows, len(self.sizes)
        self.k, self.n = (draw.choice((8, columns, draw.randint(5, columns))) for _ in range(2))
        self.r = draw.choice(ranks)
        self.ranks = [draw.choice((0, 1, self.r, draw.randint(0, self.r))) for _ in self.sizes]
        if draw.random() < 0.5:
            self.ranks = None
        self.dropout = draw.choice((0.05, 0.3, 0.9)) if number % 3 == 1 and self.r <= 64 else 0.0
        self.base = draw.choice(("none", "matrix", "row", "accumulated"))
        self.names = INPUTS if self.base != "none" else INPUTS[:3]
        self.needed = self.names if draw.random() < 0.7 else tuple(sorted(draw.sample(INPUTS[:3], draw.randint(1, 2))))
        self.layouts = {name: draw.choice(("packed", *LAYOUTS)) for name in ("x", "base", "dy")}
        self.layouts |= {name: draw.choice(("packed", *STACKS)) for name in ("lora_a", "lora_b")}
        torch.manual_seed(number)
        self.alphas = [draw.choice((0.0, 0.3, 1.0)) for _ in self.sizes]
        self.scalings = [draw.choice((0.5, 1.7, -2.0)) for _ in self.sizes]
        if draw.random() < 0.5:
            self.alphas = self.alphas[:1] * self.g
        if draw.random() < 0.5:
            self.scalings = self.scalings[:1] * self.g
        self.problem = self._problem(draw.choice((self.dtype, torch.float32)))

    def _problem(self, adapter: torch.dtype) -> Problem:
        problem = Problem.random(self.t, self.k, self.n, self.r, self.dtype)
        a = torch.randn(self.g, self.r, self.k, dtype=torch.float64) * self.k**-0.5
        b = torch.randn(self.g, self.n, self.r, dtype=torch.float64) * self.r**-0.5
        for group, rank in enumerate(self.ranks or ()):
            a[group, rank:] = torch.nan
            b[group, :, rank:] = torch.nan
        problem.lora_a, problem.lora_b = a.to(adapter), b.to(adapter)
        problem.x[sum(self.sizes) :] = torch.nan
        problem.dy = LAYOUTS[self.layouts["dy"]](problem.dy)
        return problem

    def __str__(self) -> str:
        shape = f"T={self.t} of {self.sizes} K={self.k} N={self.n} r={self.r} of {self.ranks} {self.dtype}"
        rest = f"{self.activation} {self.alphas} {self.scalings} dropout={self.dropout} base={self.base}"
        return f"problem {self.number}: {shape} {rest} gradients of {self.needed} {self.layouts}"

    def offsets(self) -> Tensor:
        return torch.tensor(self.sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def options(self) -> dict:
        options = {"activation": self.activation, "backend": self.backend}
        return options | ({"dropout_p": self.dropout, "dropout_seed": SEED} if self.dropout else {})

    def call(self, *, ranks: list[int] | None = None, base: Tensor | None = None, **tensors: Tensor) -> Tensor:
        options = self.options()
        same = len(set(self.alphas)) == 1
        alpha_t = self.alphas[0] if same else torch.tensor(self.alphas)
        same = len(set(self.scalings)) == 1
        options["scaling"] = self.scalings[0] if same else torch.tensor([self.scalings] * 2).T[:, 0]
        ranks = ranks or self.ranks
        options["ranks"] = None if ranks is None else torch.tensor(ranks, dtype=torch.int32)
        if base is not None:
            base = base[:1].expand(base.shape) if self.base == "row" else LAYOUTS[self.layouts["base"]](base)
            base = base.clone() if self.base == "accumulated" else base
            options |= {"base": base, "inplace": self.base == "accumulated"}
        x = LAYOUTS[self.layouts["x"]](tensors["x"])
        a, b = (STACKS[self.layouts[name]](tensors[name]) for name in ("lora_a", "lora_b"))
        return afa.afa_lora(x, a, b, alpha_t, offsets=self.offsets(), **options)

    def plain(self, there=ORDERS[0][0], back=ORDERS[0][1], *, x, lora_a, lora_b, base=None) -> Tensor:
        """Return what torch makes of each group, its operands turned by ``there`` and the result by ``back``."""
        mask = mask_and_p(self.dropout, SEED, self.problem.x)
        if base is None:
            base = x.new_zeros(self.t, self.n)
        elif self.base == "row":
            base = base[:1].expand(base.shape)
        # Each input is part of the graph, even where no group has rows.
        y = base + x[:0].sum() + lora_a[:0].sum() + lora_b[:0].sum()
        parts, first = [], 0
        for group, size in enumerate(self.sizes):
            rows, first = slice(first, first + size), first + size
            rank = self.r if self.ranks is None else self.ranks[group]
            own_mask = mask | {"mask": there(mask["mask"][rows])} if mask else {}
            parts.append(y[rows])
            if rank and size:
                operands = (there(t) for t in (x[rows], lora_a[group, :rank], lora_b[group, :, :rank]))
                parts[-1] = back(eager(
                    *operands, self.alphas[group], activation=self.activation, scaling=self.scalings[group],
                    base=there(y[rows]), **own_mask,
                ))  # fmt: skip
        return torch.cat([*parts, y[first:]])

    def check(self) -> dict[str, Tensor]:
        """Compare output and gradients with float64 and return them. The yardstick is the largest error of torch in
        several orders of summation, as in :func:`helpers.assert_matches`."""
        got = run(self.call, self.problem, self.names, needed=self.needed)
        truth = run(self.plain, self.problem, self.names, torch.float64, needed=self.needed)
        seen = []
        for what, value in got.items():
            for number, order in enumerate(ORDERS):
                if number == len(seen):
                    plain = functools.partial(self.plain, *order)
                    seen.append(run(plain, self.problem, self.names, needed=self.needed))
                same_dtype = max((one[what] for one in seen), key=lambda t: relative_error(t, truth[what]))
                if relative_error(value, truth[what]) <= allowed_error(same_dtype, truth[what], self.dtype):
                    break
            assert_as_accurate_as_torch(value, same_dtype, truth[what], what, self.dtype)
        return got

    def check_groups_alone(self, got: dict[str, Tensor]) -> None:
        """Compare every group, to the bit, with a call of the lone operator on its rows, its A and B filled up with
        zeros; under dropout, whose mask hangs on the place of a row, with a call in which no other group has a rank."""
        first = 0
        for group, size in enumerate(self.sizes):
            rows, first = slice(first, first + size), first + size
            rank = self.r if self.ranks is None else self.ranks[group]
            if size == 0 or rank == 0:
                continue
            alone = self._by_rank(group, rank) if self.dropout else self._alone(group, rank, rows)
            for what, value in alone.items():
                own = got[what][group] if what in ("dlora_a", "dlora_b") else got[what][rows]
                assert torch.equal(value, own), (what, group)

    def _by_rank(self, group: int, rank: int) -> dict[str, Tensor]:
        ranks = [rank if other == group else 0 for other in range(self.g)]
        alone = run(lambda **t: self.call(ranks=ranks, **t), self.problem, self.names, needed=self.needed)
        rows = slice(sum(self.sizes[:group]), sum(self.sizes[: group + 1]))
        return {what: t[group if what in ("dlora_a", "dlora_b") else rows] for what, t in alone.items()}

    def _alone(self, group: int, rank: int, rows: slice) -> dict[str, Tensor]:
        given = vars(self.problem)
        own = {name: given[name][rows] for name in ("x", "base", "dy")}
        a, b = given["lora_a"][group].clone(), given["lora_b"][group].clone()
        a[rank:], b[:, rank:] = 0, 0
        problem = Problem(**given | own | {"lora_a": a, "lora_b": b})
        if self.base == "row":
            problem.base = given["base"][:1].expand(own["base"].shape)
        options = self.options() | {"alpha_t": torch.tensor(self.alphas[group]), "scaling": self.scalings[group]}
        if len(set(self.alphas)) == 1:
            options["alpha_t"] = self.alphas[0]
        alone = run(lambda **t: afa.afa_lora(**t, **options), problem, self.names, needed=self.needed)
        if self.base == "row":
            alone.pop("dbase", None)
        if rank < self.r:
            for what, t in alone.items():
                if what == "dlora_a":
                    t[rank:] = 0
                if what == "dlora_b":
                    t[:, rank:] = 0
        return alone
