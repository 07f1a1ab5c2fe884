"""Layers that share x, as kernels of the CUDA backend: one launch for each pass, whatever the members are like."""

import re

import pytest
import torch
from conftest import skip_unless_available
from cuda_groups import Group
from helpers import assert_as_accurate_as_torch, poisoned_memory
from ptx_cuda import NAME, kernel_names, kernels, launches_of

from afa_kernels.backend import cuda
from afa_kernels.backend.interface import Call

# The N and ranks of the members, and K: q, k and v; gate and up; odd ranks, edges of every tile; the largest.
GROUPS = {
    "q, k, v": (136, (584, 72, 72), (16, 16, 16)),
    "gate, up": (264, (520, 520), (8, 8)),
    "odd": (904, (136, 584, 8), (1, 17, 5)),
    "wide": (456, (8, 392, 600), (15, 31, 16)),
    "alone": (136, (264,), (16,)),
}
ROWS = (1, 75, 200)


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available(NAME)


def flat(results) -> list[torch.Tensor]:
    first, *lists = results
    return [first, *(t for some in lists for t in some if t is not None)]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(left), flat(right), strict=True))


@pytest.mark.parametrize(("m", "float_weights"), [(1, False), (75, None), (200, True)], ids=str)
@pytest.mark.parametrize("which", GROUPS)
def test_a_group_against_float64(which, m, float_weights):
    group = Group(m, *GROUPS[which], float_weights=float_weights)
    with poisoned_memory():
        ys, zs = group.forward()
        dx, das, dbs = group.backward(zs)
    truth, torch_ops = group.plain(torch.float64), group.plain(group.x.dtype)
    got = (ys, [dx], das, dbs)
    for what, some, exact, yardstick in zip(("y", "dx", "da", "db"), got, truth, torch_ops, strict=True):
        for i, tensor in enumerate(some):
            weight = {"da": group.members[i].a, "db": group.members[i].b}.get(what, group.x)
            assert tensor.dtype == weight.dtype
            assert_as_accurate_as_torch(
                tensor.to(yardstick[i].dtype), yardstick[i], exact[i], f"{what}[{i}]", group.x.dtype
            )


@pytest.mark.parametrize("m", (*ROWS, 6200))
@pytest.mark.parametrize("which", GROUPS)
def test_a_member_has_the_bits_that_it_has_alone(which, m):
    """z and y, given z; dB where both cut the rows into equal chunks."""
    if m > 1000 and which != "q, k, v":
        pytest.skip("one pass over many rows, once")
    group = Group(m, *GROUPS[which])
    ys, zs = group.forward()
    for i, (y, z) in enumerate(zip(ys, zs, strict=True)):
        alone = group.alone(i)
        assert torch.equal(z, alone[1]) and torch.equal(y, alone[0]), i


@pytest.mark.parametrize("need_dx", [False, True])
@pytest.mark.parametrize("need_da", [(1, 0, 1), (0, 0, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("need_db", [(1, 1, 1), (0, 0, 1), (0, 0, 0)], ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_needed(need_dx, need_da, need_db):
    group = Group(75, *GROUPS["odd"])
    _, zs = group.forward()
    dx, das, dbs = group.backward(zs)
    need_da, need_db = [bool(n) for n in need_da], [bool(n) for n in need_db]
    with poisoned_memory():
        got = group.backward(zs, need_dx=need_dx, need_da=need_da, need_db=need_db)
    assert (got[0] is not None) == need_dx and (not need_dx or torch.equal(got[0], dx))
    for some, every, need in ((got[1], das, need_da), (got[2], dbs, need_db)):
        assert [t is not None for t in some] == need
        assert all(torch.equal(t, full) for t, full in zip(some, every, strict=True) if t is not None)


def test_schedules_give_the_same_bits():
    group = Group(130, *GROUPS["wide"])
    results = []
    for seed in range(3):
        kernels._module.set_seed(1000 * seed)
        ys, zs = group.forward()
        results.append([ys[0], [*ys, *zs], *group.backward(zs)[1:]])
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "m, expected",
    [
        (75, ["pack", "project", "expand", "pack", "dy", "reduce", "x", "reduce"]),
        (6200, ["pack", "forward", "pack", "dy", "reduce", "x", "reduce"]),
    ],
)
def test_what_a_group_launches(m, expected):
    """As many kernels as a lone layer has."""
    k, widths = (904, (264, 72, 72)) if m < 1000 else (16, (16, 8, 8))
    group = Group(m, k, widths, (16, 8, 5), float_weights=True)
    assert kernel_names(launches_of(lambda: group.backward(group.forward()[1]))) == expected


def test_x_is_read_once_for_all_members():
    m, k, widths, ranks = 128, 512, (256, 64, 64), (16, 16, 16)
    group = Group(m, k, widths, ranks, float_weights=False)
    zs: list[torch.Tensor] = []

    def copied(call) -> int:
        return sum(launch["async_copy_bytes"] for launch in launches_of(call))

    weights = 2 * (64 * k + 16 * sum(widths))  # packed: the rows of every A fill the class of ranks
    # Two tiles of rows read A and B.
    assert copied(lambda: zs.extend(group.forward()[1])) == 2 * m * k + 2 * weights
    slabs = k // 128  # of the x pass, each of which reads dz
    expected = 2 * m * (k + sum(widths)) + slabs * 2 * m * 64 + weights
    assert copied(lambda: group.backward(zs)) == expected


@pytest.mark.parametrize(
    "calls, reason",
    [
        ((16,) * 4, "up to 3 layers"),
        ((16, 33), "ranks up to 32 .* got 33"),
        ((17, 8, 30), "up to 64 together, .* got 80"),
    ],
)
def test_refusals_say_why(calls, reason):
    calls = [Call("cpu", torch.bfloat16, 64, 64, 64, r, "silu") for r in calls]
    assert re.search(reason, kernels.refuses_together(calls))
    assert kernels.refuses_together([calls[0]] * 2) is None


def test_limits_are_those_of_the_kernels():
    module = kernels._module
    limits = (module.MAX_RANK, module.MAX_MEMBERS, module.MAX_MEMBER_RANK)
    assert limits == (cuda._MAX_RANK, cuda._MAX_MEMBERS, cuda._MAX_MEMBER_RANK)
    with pytest.raises(ValueError, match="layers that share x have ranks up to 32: M=64, K=64, N=64,64, r=16,33"):
        module.launch_plan((64, 64, (64, 64), (16, 33)), 132, 227 << 10, 228 << 10)
    with pytest.raises(ValueError, match="up to 64 together, .*: M=64, K=64, N=64,64,64, r=17,8,30"):
        module.launch_plan((64, 64, (64,) * 3, (17, 8, 30)), 132, 227 << 10, 228 << 10)


@pytest.mark.parametrize("r", [8, 16, 32])
def test_scratch_memory_stays_small(r):
    module = kernels._module
    for k, widths in ((4096, (4096, 1024, 1024)), (4096, (4096,) * 3), (4096, (14336,) * 2), (8192, (28672,) * 2)):
        if len(widths) * r > 64:
            continue
        for m in (1, 1024, 8192, 131072):
            sizes = (m, k, widths, (r,) * len(widths))
            bound = max(64 << 20, (k + sum(widths)) * m * 2 // 50)
            assert module.forward_workspace(sizes) <= bound, sizes
            assert module.backward_workspace(sizes) <= bound, sizes
