"""The native group passes: what each member gets is what it would get alone, and dx is the sum."""

import pytest
import torch
from helpers import poisoned_memory, run_on_isa
from native_helpers import DTYPES, ISAS, NAN, assert_accurate, problem, truth_of

from afa_kernels.backend import compiled, cpu
from afa_kernels.backend import torch as torch_ops
from afa_kernels.backend.interface import Call, Member
from afa_kernels.operator.activation import COMPILED_IDS, IDENTITY
from afa_kernels.operator.options import Spec

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not cpu.BACKEND.status(), reason=cpu.BACKEND.status().reason),
]


class Group:
    """Members of different sizes on one x, and calls of them on any backend; all results are poisoned first."""

    def __init__(self, m, k, sizes, dtype, *, factors=(None,), bases=True):
        activations = ("silu", IDENTITY, "relu", "gelu")
        self.x, self.dtype = problem(m, k, 1, 1, dtype)[0], dtype
        self.members, self.dys, self.bases = [], [], []
        for i, (n, r) in enumerate(sizes):
            _, a, b, dy, base = problem(m, k, n, r, dtype, ab_dtype=factors[i % len(factors)], seed=i + 1)
            spec = Spec(activations[i % 4], 0.5 + i)
            alpha_t = None if spec.activation == IDENTITY else torch.tensor(0.3 + 0.1 * i)
            self.members.append(Member(a, b, alpha_t, spec))
            self.dys.append(dy)
            self.bases.append(base if bases else None)

    def forward(self, backend=cpu.BACKEND, threads=2):
        """Return every y and every z."""
        outs = [torch.full_like(dy, NAN) for dy in self.dys]
        with threads_of_torch(threads):
            zs = backend.forward_shared(self.x, self.members, bases=self.bases, outs=outs, save_z=True)
        return outs, zs

    def forward_alone(self, i, backend=cpu.BACKEND):
        m, out = self.members[i], torch.full_like(self.dys[i], NAN)
        z = backend.forward(self.x, m.a, m.b, m.alpha_t, None, m.spec, base=self.bases[i], out=out, save_z=True)
        return out, z

    def backward(self, zs, backend=cpu.BACKEND, threads=2, need_dx=True, need_da=None, need_db=None, **into):
        """Return dx, every da and every db."""
        every = [True] * len(self.members)
        needs = {"need_dx": need_dx, "need_da": need_da or every, "need_db": need_db or every}
        with threads_of_torch(threads):
            return backend.backward_shared(self.dys, self.x, self.members, zs, **needs, **into)

    def backward_alone(self, i, z, backend=cpu.BACKEND):
        m, needs = self.members[i], {"need_dx": True, "need_da": True, "need_db": True}
        return backend.backward(self.dys[i], self.x, m.a, m.b, z, m.alpha_t, None, m.spec, **needs)

    def check(self):
        """Compare with the members alone to the bit, dx with float64, and all with other threads."""
        outs, zs = self.forward()
        dx, das, dbs = self.backward(zs)
        dx64, dx_torch = 0, 0
        for i, m in enumerate(self.members):
            out, z = self.forward_alone(i)
            assert torch.equal(zs[i], z) and zs[i].is_contiguous(), f"z of member {i}"
            assert torch.equal(outs[i], out), f"y of member {i}"
            _, da, db = self.backward_alone(i, z)
            assert torch.equal(das[i], da) and torch.equal(dbs[i], db), f"gradients of member {i}"
            alpha_t = 0.0 if m.alpha_t is None else m.alpha_t.item()
            exact = truth_of(self.x, m.a, m.b, self.dys[i], self.bases[i], m.spec, alpha_t=alpha_t)
            alone, z_torch = self.forward_alone(i, torch_ops.BACKEND)
            dx_i, *gradients = self.backward_alone(i, z_torch, torch_ops.BACKEND)
            assert_accurate(
                (outs[i], zs[i], dx, das[i], dbs[i]), (alone, z_torch, dx, *gradients), (*exact[:2], dx, *exact[3:]),
                self.dtype, f"member {i}",
            )  # fmt: skip
            dx64, dx_torch = dx64 + exact[2], dx_torch + dx_i.float()
        dx_torch = dx_torch.to(self.dtype)
        assert_accurate((dx,) * 5, (dx_torch,) * 5, (dx64,) * 5, self.dtype, "dx")
        for threads in (1, 3):
            again, zs_again = self.forward(threads=threads)
            assert all(map(torch.equal, again + zs_again, outs + zs)), threads
            dx_again, *lists = self.backward(zs, threads=threads)
            assert torch.equal(dx_again, dx), threads
            assert all(map(torch.equal, lists[0] + lists[1], das + dbs)), threads


class threads_of_torch:
    def __init__(self, threads):
        self.threads = threads

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)


QKV = ((90, 16), (70, 3), (130, 17))
GROUPS = (
    (1, 70, QKV),
    (7, 1030, ((1100, 33), (40, 1), (600, 8))),  # slabs of several members on one thread, and of one on several
    (6, 640, ((512, 8), (512, 4), (64, 12))),  # A is read where it lies
    (64, 128, QKV),  # one block of rows of AMX, two of the others
    (65, 576, ((70, 1), (1300, 64), (33, 2), (8, 5))),
    (300, 100, ((64, 16), (64, 16), (64, 16))),  # several blocks that go through the backward together
    (300, 600, ((90, 100), (70, 33), (20, 120))),  # one such block at a time
)


def check_every_group():
    for index, (m, k, sizes) in enumerate(GROUPS):
        for dtype in DTYPES:
            for factors in ((None,), (torch.float32, None, torch.float64)):
                Group(m, k, sizes, dtype, factors=factors, bases=index % 2 == 0).check()


def test_members_get_what_they_would_get_alone():
    check_every_group()


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_on_every_instruction_set(isa):
    run_on_isa(isa, "import test_native_group\ntest_native_group.check_every_group()")


QKV_CASES = [(1, 70), (64, 128), (300, 100)]


@pytest.mark.parametrize("shape", QKV_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_subset_of_gradients_has_the_same_bits(shape, dtype):
    group = Group(*shape, QKV, dtype, factors=(None, torch.float32))
    _, zs = group.forward()
    dx, das, dbs = group.backward(zs)
    subsets = ([True, False, True], [False, False, True], [False] * 3)
    for need_dx in (True, False):
        for need_da in subsets:
            for need_db in subsets:
                with poisoned_memory():
                    got = group.backward(zs, need_dx=need_dx, need_da=need_da, need_db=need_db)
                wanted = [(got[0], need_dx, dx), *zip(got[1], need_da, das, strict=True)]
                for value, needed, full in wanted + list(zip(got[2], need_db, dbs, strict=True)):
                    assert torch.equal(value, full) if needed else value is None, (need_dx, need_da, need_db)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_given_dx_is_accumulated_into(dtype):
    group = Group(70, 130, QKV, dtype)
    _, zs = group.forward()
    dx, before = group.backward(zs)[0], torch.randn(70, 130).to(dtype)
    given = before.clone()
    returned, _, _ = group.backward(zs, dx=given)
    assert returned is given
    torch.testing.assert_close(given, (before.float() + dx.float()).to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(dtype):
    group = Group(70, 130, QKV, dtype)
    outs, zs = group.forward()
    expected = group.backward(zs)

    def spread(t):
        return torch.full((2 * t.shape[0], 3 * t.shape[1]), NAN, dtype=t.dtype)[::2, ::3].copy_(t)

    group.x = spread(group.x)
    group.members = [m._replace(a=spread(m.a), b=m.b.T.contiguous().T) for m in group.members]
    group.dys, group.bases = [spread(t) for t in group.dys], [spread(t) for t in group.bases]
    again, zs_again = group.forward()
    assert all(map(torch.equal, again + zs_again, outs + zs))
    dx, das, dbs = group.backward([spread(z) for z in zs])
    assert all(map(torch.equal, [dx, *das, *dbs], [expected[0], *expected[1], *expected[2]]))


def test_base_may_be_out():
    group = Group(70, 130, QKV, torch.float32)
    expected, _ = group.forward()
    outs = [base.clone() for base in group.bases]
    assert cpu.BACKEND.forward_shared(group.x, group.members, bases=outs, outs=outs, save_z=False) is None
    assert all(map(torch.equal, outs, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_that_are_written_past_the_cache(dtype):
    """Above 12 MB, where every machine does; one member's y is, the other's is not. A row has the same bits."""
    group = Group(2000, 3168, ((3168, 4), (40, 3)), dtype, bases=False)
    outs, zs = group.forward()
    dx, _, _ = group.backward(zs)
    group.x, group.dys, group.bases = group.x[:50], [dy[:50] for dy in group.dys], [None] * 2
    some, some_zs = group.forward()
    some_dx, _, _ = group.backward(some_zs)
    for all_rows, rows in zip([*outs, *zs, dx], [*some, *some_zs, some_dx], strict=True):
        assert torch.equal(all_rows[:50], rows)


def test_ranks_beyond_the_limit_are_refused():
    calls = [Call("cpu", torch.float32, 4, 70, 90, r, "silu") for r in (100, 156)]
    assert cpu.BACKEND.refuses_together(calls) is None
    calls[0] = calls[0]._replace(r=101)
    assert cpu.BACKEND.refuses_together(calls) == "takes ranks up to 256 together, got 257"


# --- what the module refuses


def fields_of(group):
    """Return x and a valid tuple for each member of cpu_group_forward and of cpu_group_backward."""
    outs, zs = group.forward()
    forward, backward = [], []
    for m, base, dy, out, z in zip(group.members, group.bases, group.dys, outs, zs, strict=True):
        shared = (m.a, m.b, m.alpha_t, COMPILED_IDS[m.spec.activation], m.spec.scaling)
        forward.append((*shared, base, out, z))
        backward.append((*shared, dy, z, torch.empty_like(m.a), torch.empty_like(m.b)))
    return group.x, forward, backward


def broken(fields, i, value):
    """Return the fields of all members with one of the second member's replaced."""
    return (fields[0], (*fields[1][:i], value, *fields[1][i + 1 :]), *fields[2:])


BAD_MEMBERS = [
    (0, torch.randn(3, 71), ValueError, r"lora_a: expected shape \(3, 70\)"),
    (0, None, TypeError, "lora_a"),
    (1, torch.randn(70, 300), ValueError, "expected N >= 1 and 1 <= r <= 256"),
    (1, torch.randn(70), ValueError, "lora_a|lora_b"),
    (3, 99, ValueError, "activation: unknown id"),
    (3, "silu", (TypeError, RuntimeError), "cast"),
    (3, COMPILED_IDS["silu"], TypeError, "alpha_t"),  # the second member has no alpha_t
    (4, None, (TypeError, RuntimeError), "cast"),
]


@pytest.mark.parametrize(("i", "value", "error", "match"), BAD_MEMBERS, ids=lambda v: None)
def test_a_bad_member_is_an_error(i, value, error, match):
    x, forward, backward = fields_of(Group(7, 70, QKV, torch.float32))
    with pytest.raises(error, match=match):
        compiled._C.cpu_group_forward(x, 2, broken(forward, i, value))
    with pytest.raises(error, match=match):
        compiled._C.cpu_group_backward(x, 2, broken(backward, i, value), None, False)


def test_bad_groups_are_errors():
    x, forward, backward = fields_of(Group(7, 70, QKV, torch.float32))
    calls = (
        (lambda: compiled._C.cpu_group_forward(x, 2, ()), "at least one"),
        (lambda: compiled._C.cpu_group_forward(x, 2, (forward[0][:7],)), "tuples of 8"),
        (lambda: compiled._C.cpu_group_forward(x, 2, (7,)), "tuples of 8"),
        (lambda: compiled._C.cpu_group_forward(x, 2, 7), "incompatible"),
        (lambda: compiled._C.cpu_group_forward(x.double(), 2, tuple(forward)), "do not take float64"),
        (lambda: compiled._C.cpu_group_forward(x, 2, broken(forward, 6, None)), "out: expected a torch.Tensor"),
        (lambda: compiled._C.cpu_group_forward(x, 2, broken(forward, 6, x[:, :3])), r"out: expected shape \(7, 70\)"),
        (lambda: compiled._C.cpu_group_forward(x, 2, broken(forward, 7, x[:, :3])), "z: expected a contiguous tensor"),
        (lambda: compiled._C.cpu_group_forward(x, 2, broken(forward, 5, x.double())), "base: expected the dtype"),
        (lambda: compiled._C.cpu_group_backward(x, 2, broken(backward, 8, x)), r"incompatible"),
        (lambda: compiled._C.cpu_group_backward(x, 2, broken(backward, 8, x), None, False), r"db: expected shape"),
        (lambda: compiled._C.cpu_group_backward(x, 2, broken(backward, 5, None), None, False), "dy: expected"),
        (
            lambda: compiled._C.cpu_group_backward(x, 2, broken(backward, 6, None), None, False),
            "z: expected a torch.Tensor, got None",
        ),
        (
            lambda: compiled._C.cpu_group_backward(x, 2, tuple(backward), x[:, :3], False),
            r"dx: expected shape \(7, 70\)",
        ),
        (lambda: compiled._C.cpu_group_backward(x, 2, tuple(backward), x.T.contiguous().T, False), "contiguous"),
    )
    for call, match in calls:
        with pytest.raises((TypeError, ValueError), match=match):
            call()
    wide = fields_of(Group(7, 70, ((9, 100), (9, 100)), torch.float32))[1]
    with pytest.raises(ValueError, match="ranks of at most 256 together"):
        compiled._C.cpu_group_forward(x, 2, (*wide, *wide))
