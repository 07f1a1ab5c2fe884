"""Ragged calls of a backend's passes, beside the same groups in torch ops, one after another."""

import random

import torch
from helpers import assert_as_accurate_as_torch, eager, mask_and_p, poisoned_memory
from ragged_helpers import Owners
from torch import Tensor

from afa_kernels.backend import choice
from afa_kernels.operator.activation import ACTIVATIONS, IDENTITY
from afa_kernels.operator.options import Spec

RESULTS = ("y", "z", "dx", "da", "db")


def _apart(t: Tensor) -> Tensor:
    """Return ``t`` with NaN that belong to nobody between its rows."""
    around = torch.full((*t.shape[:-1], t.shape[-1] + 8), torch.nan, dtype=t.dtype)
    around[..., : t.shape[-1]] = t
    return around[..., : t.shape[-1]]


# How the A or B of all groups may lie in memory.
LAYOUTS = {
    "packed": lambda t: t,
    "rows apart": _apart,
    "columns apart": lambda t: t.mT.contiguous().mT,
    "groups inside": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "at odd places": lambda t: torch.cat([t.new_full((*t.shape[:2], 3), torch.nan), t], 2)[:, :, 3:],
    "one for all": lambda t: t[:1].expand(t.shape),
}


class Ragged:
    """Rows of groups of the given sizes, and ``behind`` rows of none, which hold NaN as what is beyond a rank does."""

    def __init__(
        self, sizes, k: int, n: int, r: int, dtype=torch.bfloat16, *, behind=0, ranks=None, weights=None,
        layouts=("packed", "packed"), base="matrix", dropout=0.0, activation="silu", scaling=None, rows="packed",
    ):  # fmt: skip
        def draw(*shape, scale=1.0, to=dtype):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(to)

        count, self.dropout, self.weights = len(sizes), dropout, weights or dtype
        self.ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.rows = sum(sizes)
        total = self.rows + behind
        laid = _apart if rows == "apart" else lambda t: t
        self.x, self.dy, self.base = laid(draw(total, k)), laid(draw(total, n)), None
        if base != "none":
            self.base = laid(draw(total, n))
        self.accumulates = base == "accumulated"
        self.x[self.rows :] = self.dy[self.rows :] = torch.nan
        a, b = draw(count, r, k, scale=k**-0.5, to=self.weights), draw(count, n, r, scale=r**-0.5, to=self.weights)
        self.ranks = [r] * count if ranks is None else list(ranks)
        if "one for all" not in layouts:
            for g, rank in enumerate(self.ranks):
                a[g, rank:], b[g, :, rank:] = torch.nan, torch.nan
        self.a, self.b = LAYOUTS[layouts[0]](a), LAYOUTS[layouts[1]](b)
        alpha_t = None if activation == IDENTITY else torch.rand(count, 3)[:, 1]
        ranks = (
            None if ranks is None else torch.tensor([*self.ranks, -1], dtype=torch.int32).repeat_interleave(2)[:-2:2]
        )
        scaling = (torch.rand(count) + 0.5) * torch.tensor(-1.0) if scaling == "of groups" else None
        self.groups = Owners(self.ends, ranks, alpha_t, scaling)
        self.spec = Spec(activation, 1.5, round(256 * dropout))
        self.seed = torch.tensor(77) if dropout else None

    def forward(self, name: str) -> tuple[Tensor, Tensor]:
        out = self.base.clone() if self.accumulates else torch.full_like(self.dy, torch.nan)
        z = choice.get(name).forward(
            self.x, self.a, self.b, self.groups.alpha_t, self.seed, self.spec, self.groups.rows,
            base=out if self.accumulates else self.base, out=out, save_z=True,
        )  # fmt: skip
        return out, z

    def backward(self, name: str, z: Tensor, need=(True, True, True), dx: Tensor | None = None):
        need = dict(zip(("need_dx", "need_da", "need_db"), need, strict=True))
        return choice.get(name).backward(
            self.dy, self.x, self.a, self.b, z, self.groups.alpha_t, self.seed, self.spec, self.groups.rows, **need,
            dx=dx,
        )  # fmt: skip

    def of(self, g: int) -> slice:
        return slice(int(self.ends[g - 1]) if g else 0, int(self.ends[g]))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return y, dx, da and db in torch ops, all in ``dtype``."""
        mask = mask_and_p(self.dropout, 77, self.x)
        result = {
            "y": torch.zeros(self.dy.shape, dtype=dtype) if self.base is None else self.base.to(dtype).clone(),
            "dx": torch.zeros(self.x.shape, dtype=dtype),
            "da": torch.zeros(self.a.shape, dtype=dtype),
            "db": torch.zeros(self.b.shape, dtype=dtype),
        }
        for g, rank in enumerate(self.ranks):
            rows = self.of(g)
            if rank == 0 or rows.start == rows.stop:
                continue
            x = self.x[rows].to(dtype).requires_grad_()
            a, b = (w.to(self.x.dtype).to(dtype) for w in (self.a[g, :rank], self.b[g, :, :rank]))
            a, b = a.contiguous().requires_grad_(), b.contiguous().requires_grad_()
            alpha_t = 0.0 if self.groups.alpha_t is None else self.groups.alpha_t[g].item()
            scaling = self.spec.scaling if self.groups.scaling is None else self.groups.scaling[g].item()
            own = {} if not mask else {"mask": mask["mask"][rows], "p": mask["p"]}
            activation = "silu" if self.spec.activation == IDENTITY else self.spec.activation
            base = result["y"][rows].clone()
            y = eager(x, a, b, alpha_t, activation=activation, scaling=scaling, base=base, **own)
            y.backward(self.dy[rows].to(dtype))
            result["y"][rows], result["dx"][rows] = y.detach(), x.grad
            result["da"][g, :rank], result["db"][g, :, :rank] = a.grad, b.grad
        return result

    def on(self, device: str) -> "Ragged":
        there = Ragged.__new__(Ragged)
        there.__dict__ = {what: v.to(device) if isinstance(v, Tensor) else v for what, v in self.__dict__.items()}
        there.groups = Owners(*(None if t is None else t.to(device) for t in self.groups))
        return there

    def check_adding(self, name: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Compare a backward that adds to a dx with float64, and with one that makes it; return that dx as it was, with
        NaN in the rows behind the groups, and as it is then."""
        old = torch.randn(self.x.shape, dtype=torch.float64).to(self.x.dtype)
        old[self.rows :] = torch.nan
        there, into = self.on(device), old.to(device, copy=True)
        with poisoned_memory():
            _, z = there.forward(name)
            apart, added = there.backward(name, z), there.backward(name, z, dx=into)
        assert added[0] is into and all(map(torch.equal, apart[1:], added[1:]))
        new, own = into.cpu(), slice(self.rows)
        truth, same = (old.to(dtype) + self.plain(dtype)["dx"] for dtype in (torch.float64, self.x.dtype))
        assert_as_accurate_as_torch(new[own], same[own], truth[own], "dx", self.x.dtype)
        mask = mask_and_p(self.dropout, 77, self.x)
        kept = mask["mask"][own] if mask else torch.ones(self.x[own].shape, dtype=torch.bool)
        for g, rank in enumerate(self.ranks):
            kept[self.of(g)] &= rank > 0
        assert torch.equal(new[own][~kept], old[own][~kept]), "what has no branch was changed"
        assert torch.equal(new[self.rows :].view(torch.int16), old[self.rows :].view(torch.int16)), "rows of no group"
        return old, new


def random_problem(
    number: int, sizes=(0, 1, 3, 17, 64, 65, 100), dtypes=(torch.bfloat16, torch.float16)
) -> Ragged:  # fmt: skip
    draw = random.Random(number)
    torch.manual_seed(number)
    largest = (16, 32, 64, 128)[number % 4]
    r = largest if draw.random() < 0.4 else draw.randint(1 if largest == 16 else largest // 2 + 1, largest)
    count = draw.choice((1, 2, 3, 5, 9))
    own_ranks = draw.random() < 0.5
    width = lambda: 8 * draw.choice((1, 2, 9, 17, 33, 65, draw.randint(1, 70)))  # noqa: E731
    names, apart = sorted(ACTIVATIONS), tuple(LAYOUTS)[:-1]
    return Ragged(
        [draw.choice(sizes) for _ in range(count - 1)] + [draw.choice(sizes[1:])], width(), width(), r,
        draw.choice(dtypes), behind=draw.choice((0, 0, 5, 70)),
        ranks=[draw.randint(0, r) for _ in range(count)] if own_ranks else None,
        weights=draw.choice((None, torch.float32)),
        layouts=(draw.choice(apart), draw.choice(apart)) if number % 5 else ("one for all",) * 2,
        base=draw.choice(("none", "matrix", "accumulated")), dropout=draw.choice((0.0, 0.0, 0.3)),
        activation=names[number % len(names)] if number % 7 else IDENTITY,
        scaling=draw.choice((None, "of groups")), rows=draw.choice(("packed", "apart")),
    )  # fmt: skip


def assert_bits(got: dict, expected: dict, why: object) -> None:
    for what, value in expected.items():
        assert torch.equal(got[what], value), (why, what)


def assert_rounded_with_dx(name: str, dtype: torch.dtype) -> None:
    """256 + (1 + 2^-9) is 258 in bfloat16. Rounded before, the product is 1, and the sum 256. Likewise 2048 in
    float16."""
    eps = torch.finfo(dtype).eps
    p = Ragged([40], 16, 24, 2, dtype, activation=IDENTITY)
    p.spec = p.spec._replace(scaling=1.0)
    p.dy[:, 0], p.dy[:, 1:], p.a[:] = 1.0, 0.0, 1.0
    p.b[0, 0] = torch.tensor([1.0, eps / 4])
    into = torch.full_like(p.x, 2 / eps)
    p.backward(name, p.forward(name)[1], dx=into)
    assert (into == 2 / eps + 2).all()
