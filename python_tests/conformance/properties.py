"""What every backend promises of every call, each promise as one function of a target and a problem.

A promise that is added to the list is tested on every target, for each kind of call that it is about.
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from helpers import DTYPES, assert_accurate, poisoned_memory
from torch import Tensor

import afa_kernels as afa
from afa_kernels.backend.interface import Call
from afa_kernels.operator.activation import IDENTITY
from conformance.problems import KINDS, Problem
from conformance.targets import Target


class Property(NamedTuple):
    """One promise, and of what calls it is one."""

    holds: Callable[[Target, Problem], None]
    kinds: tuple[str, ...] = KINDS
    exact: bool = False  # promised by targets with exact bits alone
    draw: dict = {}  # what its problems are like
    times: int = 1  # as many problems as other promises have

    @property
    def name(self) -> str:
        return self.holds.__name__


def check(where: Target, kind: str, promise: "Property", number: int) -> bool:
    """Test a promise on the problem of a number. Where the PTX machine has the one report that is known, return True,
    and test the same problem without the pipeline that it is about."""
    try:
        _check(where, kind, promise, number, pipelined=True)
    except RuntimeError as error:
        if not where.is_known(error):
            raise
        _check(where, kind, promise, number, pipelined=False)
        return True
    return False


def _check(where: Target, kind: str, promise: "Property", number: int, *, pipelined: bool) -> None:
    problem = Problem.random(where, kind, number, **promise.draw)
    with where.choices(problem, pipelined=pipelined):
        promise.holds(where, problem)


def is_accurate_under_every_schedule(where: Target, p: Problem) -> None:
    """y, z, dx, dA and dB, against float64; with the same bits whatever the threads, the order of warps and blocks, and
    the way sums are spread."""
    first = None
    for schedule in where.schedules(p.number):
        with schedule:
            got = p.run(where.backend)
        if first is None:
            p.check(got)
        first = first or got
        _assert_bits(got, first, p)


def gives_the_gradients_that_are_needed(where: Target, p: Problem) -> None:
    """Any of them, with the bits that they have together, and None for the others."""
    backend = where.backend
    every = p.run(backend)
    names = [name for name in every if name.startswith("d")]
    draw = random.Random(p.number)
    for _ in range(3):
        needed = set(draw.sample(names, draw.randint(0, len(names) - 1)))
        with poisoned_memory():
            got = p.backward(backend, every, needed)
        for name in names:
            assert (got[name] is not None) == (name in needed), f"{p}: {name} where {needed} are needed"
            assert got[name] is None or _same(got[name], every[name]), f"{p}: {name} where {needed} are needed"


def gives_y_without_z(where: Target, p: Problem) -> None:
    """With the same bits."""
    with_z, without = p.run(where.backend), p.run(where.backend, save_z=False)
    _assert_bits(without, {name: t for name, t in with_z.items() if name.startswith("y")}, p)


def has_the_bits_of_packed_operands(where: Target, p: Problem) -> None:
    """Whatever their strides."""
    _assert_bits(p.run(where.backend), p.with_packed_operands().run(where.backend), p)


def reads_weights_as_if_rounded(where: Target, p: Problem) -> None:
    """A and B of a wider dtype: the bits of a call whose caller has rounded them to the dtype of x, and gradients that
    are rounded to these once."""
    narrow = replace(p, outputs=[replace(o, a=o.a.to(p.x.dtype), b=o.b.to(p.x.dtype)) for o in p.outputs])
    got, expected = p.run(where.backend), narrow.run(where.backend)
    _assert_bits({name: t.to(p.x.dtype) for name, t in got.items()}, expected, p)


def adds_to_dx(where: Target, p: Problem) -> None:
    """With one rounding; what has no branch keeps its bits, and A and B get the same gradients."""
    if not where.adds_to_dx(p):
        return
    backend = where.backend
    old = torch.randn(p.x.shape, dtype=torch.float64).to(p.x)
    into = old.clone()
    apart = p.run(backend)
    added = p.backward(backend, apart, dx=into)
    assert added["dx"] is into
    _assert_bits(added, {name: t for name, t in apart.items() if name[:2] in ("da", "db")}, p)
    truth = {"dx": old.double() + p.plain(torch.float64)["dx"]}
    assert_accurate({"dx": into}, truth, lambda order: {"dx": old + p.in_order(order)["dx"]}, p.x.dtype, str(p))
    untouched = _without_branch(p)
    assert _same(into[untouched], old[untouched]), f"{p}: dx of what has no branch was changed"


def rounds_dx_once(where: Target, p: Problem) -> None:
    """Where it adds: 256 + (1 + 2^-9) is 258 in bfloat16; rounded before, the product is 1, and the sum 256. Likewise
    2048 in float16."""
    dtype = DTYPES[where.dtypes[p.number % len(where.dtypes)].replace("tf32", "f32")]
    if not where.adds_to_dx(p) or dtype.itemsize > 2:
        return
    eps = torch.finfo(dtype).eps
    exact = Problem.of_owners(dtype, (40,), 16, 24, 2, activation=IDENTITY, scaling=1.0).on(where.device)
    (o,) = exact.outputs
    o.dy[:, 0], o.dy[:, 1:], o.a[:] = 1.0, 0.0, 1.0
    o.b[0, 0] = torch.tensor([1.0, eps / 4])
    into = torch.full_like(exact.x, 2 / eps)
    exact.backward(where.backend, exact.run(where.backend), dx=into)
    assert (into == 2 / eps + 2).all(), where.name


def keeps_the_bits_of_rows(where: Target, p: Problem) -> None:
    """y, z and dx of some rows in a call of their own are those in the call of all."""
    every, rows, draw = p.run(where.backend), len(p.x), random.Random(p.number)
    # Around the rows that kernels take at once, and blocks of them.
    around = draw.sample((2, 3, 4, 5, 6, 7, 16, 17, 47, 48, 49, 64, 65, 97, 193, 257), 3)
    for count in {1, rows // 2, *around}:
        if not 0 < count < rows:
            continue
        for first in sorted({0, (rows - count) // 2, rows - count}):
            own = slice(first, first + count)
            got = p.of_rows(own).run(where.backend)
            for name, t in got.items():
                if name[0] in "yz" or name == "dx":
                    assert _same(t, every[name][own]), f"{p}: {name} of rows {first} to {first + count - 1}"


def is_one_call_for_each_branch(where: Target, p: Problem) -> None:
    """Each owner's rows, and each member, have the bits of a lone call."""
    every = p.run(where.backend)
    for part, places in p.parts(same_r=where.tiles_hang_on_r):
        got = part.run(where.backend)
        for name, (of, index) in places.items():
            whole = every[of][index]
            own = got[name][tuple(slice(size) for size in whole.shape)]
            assert _same(own, whole), f"{part}: {name}"


def is_one_call_for_each_owner_under_dropout(where: Target, p: Problem) -> None:
    """In which the others have no rank."""
    every = p.run(where.backend)
    for _, g, rows, a, _, _, _ in p.branches():
        if len(a) == 0 or rows.start == rows.stop:
            continue
        got = p.with_ranks_of(g).run(where.backend)
        for name, index in {"y0": rows, "z0": rows, "dx": rows, "da0": g, "db0": g}.items():
            assert _same(got[name][index], every[name][index]), f"{p}: {name} of owner {g}"


def leaves_what_has_no_branch(where: Target, p: Problem) -> None:
    """Rows without an owner, and those of an owner of rank 0: y is the base, and z and dx are zero. So are dA and dB
    beyond a rank."""
    got, rest, (o,) = p.run(where.backend), _rows_without_branch(p), p.outputs
    base = torch.zeros_like(o.dy) if o.base is None else o.base
    assert _same(got["y0"][rest], base[rest]) and not got["z0"][rest].any() and not got["dx"][rest].any(), str(p)
    for _, g, rows, a, _, _, _ in p.branches():
        rank = len(a) if rows.start < rows.stop else 0
        beyond = (got["da0"][g, rank:], got["db0"][g, :, rank:], got["z0"][rows, rank:])
        assert not any(t.any() for t in beyond), f"{p}: owner {g}"


def lets_infinities_go_where_sums_go(where: Target, p: Problem) -> None:
    """And nowhere else: a zero of padding times infinity would be NaN."""
    owned = p.behind().start
    for row, column, value in ((owned // 2, 0, math.inf), (owned // 3, -1, math.nan)):
        if owned:
            p.x[row, column] = value
            for o in p.outputs:
                if o.dy.stride(0) != 0:
                    o.dy[owned - 1 - row, column] = value
    got, truth = p.run(where.backend), p.plain(torch.float64)
    for name, t in got.items():
        finite, expected = t.isfinite(), truth[name].isfinite()
        assert not (finite & ~expected).any(), f"{p}: {name} has numbers where sums are none"
        assert not where.keeps_rows_apart(p) or torch.equal(finite, expected), f"{p}: {name} has too few numbers"


def draws_the_mask_of_the_contract(where: Target, p: Problem) -> None:
    """Which depends on the row, the column and the seed alone: dx of ones is the mask."""
    o, k = p.outputs[0], p.x.shape[1]
    mask = p.mask()
    a, b = torch.zeros_like(o.a), torch.zeros_like(o.b)
    a[..., 0, :], b[..., 0, 0] = 1, 1
    o.a, o.b, o.alpha_t, o.spec = a, b, None, o.spec._replace(activation=IDENTITY, scaling=1.0)
    o.base, o.accumulates = None, False
    o.dy = torch.zeros_like(o.dy)
    o.dy[:, 0] = 1
    p.rows = None if p.rows is None else p.rows._replace(ranks=None, scaling=None)
    own = slice(p.behind().start)
    dx = p.run(where.backend)["dx"][own]
    expected = (mask["mask"] / (1 - mask["p"])).expand(len(p.x), k)[own].to(dx.dtype)
    torch.testing.assert_close(dx, expected, **({"rtol": 2**-10, "atol": 0} if p.tf32 else {}))


PROPERTIES = (
    Property(is_accurate_under_every_schedule),
    Property(gives_the_gradients_that_are_needed),
    Property(gives_y_without_z),
    Property(has_the_bits_of_packed_operands, exact=True),
    Property(reads_weights_as_if_rounded, exact=True),
    Property(adds_to_dx, times=2),
    Property(rounds_dx_once, ("owners",), exact=True),
    Property(keeps_the_bits_of_rows, ("lone", "shared"), exact=True, draw={"dropout": False}),
    Property(is_one_call_for_each_branch, ("owners", "experts", "shared"), exact=True, draw={"dropout": False}),
    Property(is_one_call_for_each_owner_under_dropout, ("owners",), exact=True, draw={"dropout": True}),
    Property(leaves_what_has_no_branch, ("owners",)),
    Property(lets_infinities_go_where_sums_go, draw={"dropout": False}),
    Property(draws_the_mask_of_the_contract, ("lone", "owners"), draw={"dropout": True}),
)


def refuses_with_a_reason(where: Target) -> None:
    """What a backend does not take is an error that names what came, before anything runs."""
    usual = Call(where.device.type, DTYPES[where.dtypes[0]], 8, 8, 8, 8, "silu")
    assert where.backend.why_not(usual) is None
    for change in where.refused:
        call = usual._replace(**change)
        reason = where.backend.why_not(call)
        for came in change.values():
            assert str(came).removeprefix("torch.") in reason, (where.name, change, reason)
        x, a, b = (torch.zeros(shape, dtype=call.dtype) for shape in ((8, call.k), (call.r, call.k), (8, call.r)))
        if not call.owners:
            with pytest.raises(afa.BackendUnavailable, match=re.escape(reason)):
                afa.afa_lora(
                    x.to(where.device), a.to(where.device), b.to(where.device), 0.5, backend=where.backend.name
                )


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and torch.equal(one.nan_to_num(), other.nan_to_num())
        and torch.equal(one.isnan(), other.isnan())
    )


def _assert_bits(got: dict[str, Tensor], expected: dict[str, Tensor], p: Problem) -> None:
    for name, t in expected.items():
        assert _same(got[name], t), f"{p}: {name}"


def _rows_without_branch(p: Problem) -> Tensor:
    rest = torch.ones(len(p.x), dtype=torch.bool, device=p.x.device)
    for _, _, rows, a, _, _, _ in p.branches():
        if len(a):
            rest[rows] = False
    return rest


def _without_branch(p: Problem) -> Tensor:
    """Return which elements of dx get nothing from a branch."""
    rest = _rows_without_branch(p)[:, None].expand(p.x.shape).clone()
    if p.outputs[0].spec.dropout:
        rest |= p.mask()["mask"] == 0
    return rest
