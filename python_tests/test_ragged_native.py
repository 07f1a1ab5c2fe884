"""Ragged calls of the native CPU kernels: accuracy on random problems, bits, what they read and write."""

import random

import pytest
import torch
from helpers import run_on_isa
from native_helpers import DTYPES, ISAS, NAN, assert_accurate
from ragged_helpers import Owners

from afa_kernels.backend import cpu
from afa_kernels.backend import reference as reference_backend
from afa_kernels.backend import torch as torch_ops
from afa_kernels.backend.interface import Rows
from afa_kernels.operator.activation import ACTIVATIONS, IDENTITY
from afa_kernels.operator.options import Spec
from afa_kernels.operator.reference import owners

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not cpu.BACKEND.status(), reason=cpu.BACKEND.status().reason),
]


def stacked(t, order):
    """The same values with the dimensions in another order in memory; PEFT keeps lora_B expert-fastest."""
    back = [order.index(i) for i in range(3)]
    return t.permute(order).contiguous().permute(back)


ORDERS = ((0, 1, 2), (1, 2, 0), (2, 1, 0), (0, 2, 1))


class Problem:
    """One random call: operands of any strides and dtypes, what differs between groups, and what is wanted."""

    def __init__(self, draw, sizes, k, n, r, dtype, seed):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=generator) * scale

        groups, rows = len(sizes), sum(sizes) + draw.choice((0, 0, 3, 70))
        factors = draw.choice((dtype, torch.float32, torch.float64))
        self.x, self.dy, self.base = (normal(rows, c).to(dtype) for c in (k, n, n))
        self.a = stacked(normal(groups, r, k, scale=k**-0.5).to(factors), draw.choice(ORDERS))
        self.b = stacked(normal(groups, n, r, scale=r**-0.5).to(factors), draw.choice(ORDERS))
        self.activation = draw.choice((*ACTIVATIONS, IDENTITY))
        alphas = torch.rand(groups, generator=generator) if draw.random() < 0.5 else torch.tensor(0.3).expand(groups)
        self.groups = Owners(
            torch.tensor(sizes).cumsum(0).int(),
            torch.tensor([draw.choice((0, r // 2, r - 1, r)) for _ in sizes]).int() if draw.random() < 0.5 else None,
            None if self.activation == IDENTITY else alphas,
            normal(groups) if draw.random() < 0.5 else None,
        )
        self.spec = Spec(self.activation, 1.5, draw.choice((0, 0, 64)))
        self.seed = torch.tensor(seed)
        self.base_is = draw.choice(("absent", "given", "out"))

    def run(self, backend, *, threads=2, to=None):
        """Return y, z, dx, da, db; the output and the memory of the gradients are poisoned first."""
        x, dy, base = (t if to is None else t.to(to) for t in (self.x, self.dy, self.base))
        a, b = (t if to is None else t.to(self.x.dtype).to(to) for t in (self.a, self.b))
        out = base.clone() if self.base_is == "out" else torch.full_like(base, NAN)
        base = {"absent": None, "given": base, "out": out}[self.base_is]
        needs = {"need_dx": True, "need_da": True, "need_db": True}
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            call = (self.groups.alpha_t, self.seed, self.spec, self.groups.rows)
            z = backend.forward(x, a, b, *call, base=base, out=out, save_z=True)
            gradients = backend.backward(dy, x, a, b, z, *call, **needs)
        finally:
            torch.set_num_threads(before)
        return out, z, *gradients

    def with_columns_reversed(self):
        """The same call with N, and K where no mask depends on it, the other way round."""
        other = object.__new__(Problem)
        changed = {"dy": self.dy.flip(1), "base": self.base.flip(1), "b": self.b.flip(1)}
        if not self.spec.dropout:
            changed |= {"x": self.x.flip(1), "a": self.a.flip(2)}
        vars(other).update(vars(self) | changed)
        return other

    def by_torch(self, truth):
        """Return what torch gives in the dtype of x: of two orders of its sums the one that is further from the truth,
        since where terms cancel either may be near it by chance."""
        y, z, dx, da, db = self.with_columns_reversed().run(torch_ops.BACKEND)
        if not self.spec.dropout:
            dx, da = dx.flip(1), da.flip(2)
        orders = zip(self.run(torch_ops.BACKEND), (y.flip(1), z, dx, da, db.flip(1)), truth, strict=True)
        return [max(one, other, key=lambda t: (t.double() - exact).abs().max()) for one, other, exact in orders]

    def check(self):
        truth = self.run(reference_backend.BACKEND, to=torch.float64)
        got = self.run(cpu.BACKEND)
        assert_accurate(got, self.by_torch(truth), truth, self.x.dtype, self.describe())
        for threads in (1, 3):
            for one, other in zip(got, self.run(cpu.BACKEND, threads=threads), strict=True):
                assert torch.equal(one, other), (threads, self.describe())

    def describe(self):
        return self.seed, self.x.shape, self.b.shape, self.a.dtype, self.groups, self.spec, self.base_is


def random_problems(count, first=0):
    for seed in range(first, first + count):
        draw = random.Random(seed)
        # From one group with all rows, which takes all threads, to many small ones, which take one each.
        sizes = [draw.choice((0, 0, 1, 3, 6, 20, 49)) for _ in range(draw.choice((1, 3, 9, 20)))]
        if draw.random() < 0.3:
            sizes[draw.randrange(len(sizes))] = draw.choice((120, 260))
        if sum(sizes) == 0:
            sizes[-1] = 2
        k, n = (draw.choice((17, 64, 130, 300)) for _ in "kn")
        yield Problem(draw, sizes, k, n, draw.choice((3, 4, 7, 16, 33)), DTYPES[seed % 3], seed)


@pytest.mark.long
def test_random_problems(monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    for problem in random_problems(300):
        problem.check()


_empty = torch.empty


def poisoned_empty(*shape, **options):
    t = _empty(*shape, **options)
    return t.fill_(NAN) if t.is_floating_point() else t


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_on_isa(
        isa,
        "import test_ragged_native as t\nfor problem in t.random_problems(15, 1000):\n    problem.check()\n",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_group_has_the_bits_of_a_call_of_its_own(dtype):
    """Whether the group runs on one thread or on all of them; with dropout from its row of the mask on."""
    draw = random.Random(1)
    p = Problem(draw, (5, 0, 400, 1, 70, 6, 48, 49), 530, 140, 12, dtype, 2)
    p.spec, p.base_is = p.spec._replace(dropout=0), "given"
    out, z, dx, da, db = p.run(cpu.BACKEND)
    for group, rows, *_ in owners(p.groups.rows, 12, None, p.spec):
        others = [None if values is None else values[group : group + 1] for values in p.groups[1:]]
        one = Owners(torch.tensor([rows.stop - rows.start]).int(), *others)
        alone = object.__new__(Problem)
        vars(alone).update(vars(p) | {
            "x": p.x[rows], "dy": p.dy[rows], "base": p.base[rows], "groups": one,
            "a": p.a[group : group + 1], "b": p.b[group : group + 1],
        })  # fmt: skip
        want = alone.run(cpu.BACKEND)
        for got, value in zip((out[rows], z[rows], dx[rows], da[group], db[group]), want, strict=True):
            assert torch.equal(got, value.view_as(got)), group


def test_a_rank_below_r_leaves_gaps_in_db():
    """Where N is in whole tiles and the rank needs no padding, a dense dB is summed where it lies; this one is not."""
    x, dy, a, b = torch.randn(40, 64), torch.randn(40, 192), torch.randn(2, 8, 64), torch.randn(2, 192, 8)
    offsets, needs = torch.tensor([20, 40]).int(), {"need_dx": False, "need_da": False, "need_db": True}

    def db(ranks, a, b):
        call = (torch.full((2,), 0.5), None, Spec("silu", 1.0), Rows(offsets, ranks, None))
        z = cpu.BACKEND.forward(x, a, b, *call, base=None, out=torch.empty_like(dy), save_z=True)
        return cpu.BACKEND.backward(dy, x, a, b, z, *call, **needs)[2]

    wide = db(torch.tensor([4, 4]).int(), a, b)
    assert torch.equal(wide[..., :4], db(None, a[:, :4].contiguous(), b[..., :4].contiguous()))
    assert not wide[..., 4:].any()


def test_dx_is_accumulated_into():
    p = Problem(random.Random(3), (5, 0, 60, 9), 64, 48, 6, torch.float32, 3)
    p.spec, p.groups = p.spec._replace(dropout=0), p.groups._replace(ranks=torch.tensor([3, 1, 6, 0]).int())
    _, z, dx, _, _ = p.run(cpu.BACKEND)
    start = torch.randn_like(dx)
    into = start.clone()
    needs = {"need_dx": True, "need_da": False, "need_db": False}
    call = (p.groups.alpha_t, None, p.spec, p.groups.rows)
    got, da, db = cpu.BACKEND.backward(p.dy, p.x, p.a, p.b, z, *call, dx=into, **needs)
    assert got is into and da is None and db is None
    torch.testing.assert_close(into, start + dx)
    assert torch.equal(into[65:], start[65:]), "rows without a branch were written"


def test_strided_rows_and_base():
    p = Problem(random.Random(5), (20, 3, 0, 60), 70, 50, 8, torch.float32, 5)
    p.base_is = "given"
    want = p.run(cpu.BACKEND)
    wide = torch.full((len(p.x), 2 * 70), NAN)
    wide[:, ::2] = p.x
    p.x, p.dy, p.base = wide[:, ::2], p.dy.T.contiguous().T, p.base.T.contiguous().T
    for got, value in zip(p.run(cpu.BACKEND), want, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offsets": torch.tensor([4, 2, 9]).int()}, "offsets"),
        ({"offsets": torch.tensor([4, 5, 90]).int()}, "offsets"),
        ({"offsets": torch.tensor([-4, 5, 9]).int()}, "offsets"),
        ({"offsets": torch.tensor([4, 5, 9])}, "offsets"),
        ({"ranks": torch.tensor([1, 9, 1]).int()}, "ranks"),
        ({"alpha_t": torch.ones(4)}, "alpha_t"),
        ({"scaling": torch.ones(3).double()}, "scaling"),
    ],
)
def test_the_module_leaves_no_tensor_whoever_calls(change, message):
    x, a, b, out = torch.randn(9, 8), torch.randn(3, 2, 8), torch.randn(3, 5, 2), torch.empty(9, 5)
    groups = Owners(torch.tensor([4, 5, 9]).int(), None, torch.ones(3), None)._replace(**change)
    with pytest.raises(ValueError, match=message):
        cpu.BACKEND.forward(
            x, a, b, groups.alpha_t, None, Spec("silu", 1.0), groups.rows, base=None, out=out, save_z=False
        )


def test_all_shapes_are_checked_by_the_module():
    x, a, b, out = torch.randn(9, 8), torch.randn(3, 2, 8), torch.randn(3, 5, 2), torch.empty(9, 5)
    groups = Owners(torch.tensor([4, 5, 9]).int(), None, torch.ones(3), None)
    for operands in ((x, a[:2], b), (x, a[:, :1], b), (x, a[..., :7], b), (x, a[0], b), (x, a, b[0])):
        with pytest.raises(ValueError, match="expected"):
            call = (groups.alpha_t, None, Spec("silu", 1.0), groups.rows)
            cpu.BACKEND.forward(*operands, *call, base=None, out=out, save_z=False)
