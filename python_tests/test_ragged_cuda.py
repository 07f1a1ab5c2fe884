"""The ragged kernels of the CUDA backend, on the emulator."""

import pytest
import torch
from conftest import skip_unless_available
from cuda_ragged import Ragged, assert_bits, assert_rounded_with_dx, random_problem
from helpers import assert_as_accurate_as_torch

import afa_kernels as afa
from afa_kernels.activation import IDENTITY
from afa_kernels.backend import cuda
from afa_kernels.backend.registry import Call, Groups

EMULATED = "cuda_emulated"


@pytest.fixture(autouse=True)
def _emulator():
    skip_unless_available(EMULATED)
    torch.manual_seed(1)


def emulator():
    return cuda._emulator_module()[0]


# --- Against float64 ---


@pytest.mark.parametrize("number", range(24))
def test_random_problems(number):
    random_problem(number, sizes=(0, 1, 3, 17, 64, 65)).check(EMULATED)


@pytest.mark.parametrize("number", range(24))
def test_on_a_gpu(number):
    skip_unless_available("cuda")
    random_problem(number, sizes=(0, 1, 17, 65, 700)).check("cuda", "cuda")


@pytest.mark.parametrize("r", [5, 20])
def test_groups_of_several_chunks(r):
    chunk = 512 if r <= 16 else 1024
    problem = Ragged([chunk + 1, 0, 3 * chunk - 70, 1, chunk], 16, 24, r, weights=torch.float32, scaling="of groups")
    got = problem.check(EMULATED)
    for g in (0, 2):
        alone = problem.alone(g).run(EMULATED)
        assert torch.equal(got["da"][g], alone["da"][0]) and torch.equal(got["db"][g], alone["db"][0])


def test_more_groups_than_a_block_has_threads():
    sizes = [(g * 7919) % 3 for g in range(300)]
    Ragged(sizes, 16, 24, 8, ranks=[g % 9 for g in range(300)]).check(EMULATED)


@pytest.mark.parametrize("through", ["lora", "linear"])
def test_the_operator(through):
    p = Ragged([30, 0, 65, 2], 72, 80, 12, behind=3, ranks=[12, 5, 7, 0], weights=torch.float32, dropout=0.3)
    p.x[p.rows :] = p.dy[p.rows :] = 0.25  # torch's own products read them
    p.a.nan_to_num_(), p.b.nan_to_num_()
    weight, bias = torch.randn(4, 80, 72).to(p.x.dtype), torch.randn(80).to(p.x.dtype)

    def call(backend, dtype):
        leaves = [t.to(dtype or t.dtype).detach().clone().requires_grad_() for t in (p.x, p.a, p.b, p.base)]
        options = {"dropout_p": 0.3, "dropout_seed": 77, "ranks": p.groups.ranks, "backend": backend}
        x, a, b, base = leaves
        if through == "lora":
            y = afa.afa_lora_grouped(x, p.ends, a, b, p.groups.alpha_t, base=base, **options)
        else:
            own = (weight.to(x.dtype), bias.to(x.dtype))
            y = afa.afa_linear_grouped(x, p.ends, *own, a, b, p.groups.alpha_t, **options)
        y.backward(p.dy.to(y.dtype))
        return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]

    results = [call(EMULATED, None), call("torch", None), call("reference", torch.float64)]
    for what, got, same, truth in zip(("y", "dx", "da", "db"), *results, strict=False):
        assert_as_accurate_as_torch(got, same, truth, what, p.x.dtype)


# --- A group has the bits that it has alone ---


@pytest.mark.parametrize("r", [16, 32, 64, 128])
def test_the_bits_of_a_group_are_those_that_it_has_alone(r):
    p = Ragged([30, 0, 65, 128, 2], 136, 584, r, behind=9, ranks=[r, r, 7, r // 2 + 1, 0], weights=torch.float32)
    got = p.run(EMULATED)
    for g in (0, 2, 3):
        rows, rank = p.of(g), p.ranks[g]
        mine = {what: got[what][rows] for what in ("y", "z", "dx")} | {what: got[what][g] for what in ("da", "db")}
        alone = p.alone(g).run(EMULATED)
        assert_bits(mine, alone | {what: alone[what][0] for what in ("da", "db")}, g)
        # An ordinary call of that rank cuts its sums over rows in other places, and nothing else.
        mine["z"] = mine["z"][:, :rank]
        assert_bits(mine, p.lone(EMULATED, g), g)


def test_a_sum_over_wide_rows_has_the_order_of_its_own_rank():
    p = Ragged([3, 5], 16, 4360, 40, ranks=[8, 40])
    got = p.run(EMULATED)
    for g in range(2):
        assert torch.equal(got["dx"][p.of(g)], p.lone(EMULATED, g)["dx"])


def test_the_mask_of_a_group_is_that_of_its_rows_of_x():
    everything = Ragged([30, 0, 65, 2], 136, 72, 16, ranks=[16] * 4, dropout=0.3)
    got = everything.run(EMULATED)
    for g in range(4):
        everything.groups = everything.groups._replace(ranks=torch.tensor([16 * (g == i) for i in range(4)]).int())
        one, rows = everything.run(EMULATED), everything.of(g)
        for what in ("y", "z", "dx"):
            assert torch.equal(one[what][rows], got[what][rows])
        for what in ("da", "db"):
            assert torch.equal(one[what][g], got[what][g]) and not one[what][:g].any() and not one[what][g + 1 :].any()


@pytest.mark.parametrize("r", [16, 64])
def test_gradients_do_not_depend_on_what_else_is_asked_for(r):
    p = Ragged([30, 0, 65, 2], 72, 80, r, behind=5, ranks=[r, r, 7, 0], dropout=0.3, weights=torch.float32)
    y, z = p.forward(EMULATED)
    again, none = p.forward(EMULATED, save_z=False)
    assert torch.equal(y, again) and none is None
    everything = p.backward(EMULATED, z)
    for need in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)):
        for saved in (z, None):
            for wanted, full, got in zip(need, everything, p.backward(EMULATED, saved, need), strict=True):
                assert (got is None) == (not wanted)
                assert got is None or torch.equal(got, full)


@pytest.mark.parametrize(("r", "rows"), [(16, 3520), (16, 5300), (32, 2650)])
def test_in_rounds_of_columns_the_bits_are_the_same(r, rows):
    """Where there is no room for the sums over rows of all slabs at once, and with more rows none for their sums of dh
    either."""
    p = Ragged([20, 0, 5], 16, 28672, r, ranks=[r, r, 3], scaling="of groups", weights=torch.float32)
    p.dy = p.dy[:1].expand(p.dy.shape)
    _, z = p.forward(EMULATED)
    dx, *sums = p.backward(EMULATED, z)
    longer, *longer_sums = p.lengthened(rows).backward(EMULATED, torch.cat([z, z.new_zeros(rows, r)]))
    limits = emulator().device_limits(0)
    kernels = [emulator().ragged_kernels((m, 16, 28672, r), 3, *limits) for m in (25, 25 + rows)]
    rounds = [{launch["kernel"]: launch["launches"] for launch in launches}["ragged_dy"] for launches in kernels]
    assert rounds[0] == 1 < rounds[1]
    assert torch.equal(longer[:25], dx) and not longer[25:].any()
    assert all(map(torch.equal, sums, longer_sums))


# --- dx is added to what is there ---


@pytest.mark.parametrize("number", range(24))
def test_random_problems_that_add_to_dx(number):
    random_problem(number, sizes=(0, 1, 3, 17, 64, 65)).check_adding(EMULATED)


@pytest.mark.parametrize("number", range(24))
def test_adding_to_dx_on_a_gpu(number):
    skip_unless_available("cuda")
    random_problem(number, sizes=(0, 1, 17, 65, 700)).check_adding("cuda", "cuda")


@pytest.mark.parametrize("r", [5, 20])
def test_groups_of_several_chunks_that_add_to_dx(r):
    chunk = 512 if r <= 16 else 1024
    Ragged([chunk + 1, 0, 3 * chunk - 70, 1, chunk], 16, 24, r, behind=3, dropout=0.3).check_adding(EMULATED)


@pytest.mark.parametrize("r", [16, 32, 64, 128])
def test_the_bits_of_what_is_added_to_are_those_of_the_group_alone(r):
    p = Ragged([30, 0, 65, 128, 2], 136, 584, r, behind=9, ranks=[r, r, 7, r // 2 + 1, 0])
    old, new = p.check_adding(EMULATED)
    for g in (0, 2, 3):
        alone, into = p.alone(g), old[p.of(g)].clone()
        alone.backward(EMULATED, alone.forward(EMULATED)[1], dx=into)
        assert torch.equal(into, new[p.of(g)])


@pytest.mark.parametrize("r", [16, 64])
def test_what_is_added_to_dx_does_not_depend_on_what_else_is_asked_for(r):
    """Without dA, x is not read."""
    p = Ragged([30, 0, 65, 2], 72, 80, r, behind=5, ranks=[r, r, 7, 0], dropout=0.3, weights=torch.float32)
    old, new = p.check_adding(EMULATED)
    _, z = p.forward(EMULATED)
    for need in ((1, 0, 0), (1, 1, 0), (1, 0, 1)):
        for saved in (z, None):
            x, into = p.x, old.clone()
            if saved is not None and not need[1]:
                p.x = torch.full_like(x, torch.nan)
            p.backward(EMULATED, saved, need, dx=into)
            p.x = x
            assert torch.equal(into[: p.rows], new[: p.rows]), (need, saved is None)


def test_what_is_added_to_dx_is_rounded_with_it():
    assert_rounded_with_dx(EMULATED)


def test_dx_is_added_to_once_where_operands_are_copied():
    p = Ragged([30, 0, 65, 2], 72, 80, 16, dropout=0.3, layouts=("columns apart", "packed"))
    p.x, p.dy = (t.T.contiguous().T for t in (p.x, p.dy))
    p.check_adding(EMULATED)


def test_a_dx_that_is_not_packed_is_refused():
    p = Ragged([30, 4], 72, 80, 16)
    _, z = p.forward(EMULATED)
    rows_apart, at_an_odd_place = p.x.new_empty(34, 80)[:, :72], p.x.new_empty(34 * 72 + 1)[1:].view(34, 72)
    for dx in (rows_apart, at_an_odd_place):
        with pytest.raises(ValueError, match="dx: expected packed rows"):
            p.backward(EMULATED, z, dx=dx)


def test_a_call_at_identity():
    Ragged([30, 0, 65], 72, 80, 16, activation=IDENTITY).check(EMULATED)


# --- What may go wrong ---


@pytest.mark.parametrize("ends", [[50, 20, 97], [-5, 40, 97], [30, 200, 97], [97, 97, 3]], ids=str)
def test_bad_ends_touch_nothing_but_the_tensors(ends):
    """They are on the device, where nobody checks them; the emulator fails where a kernel leaves its buffers."""
    p = Ragged([30, 60, 7], 72, 80, 16, ranks=[16, 99, -3])
    p.a.nan_to_num_(), p.b.nan_to_num_()
    p.groups = Groups(torch.tensor(ends, dtype=torch.int32), *p.groups[1:])
    _, z = p.forward(EMULATED)
    p.backward(EMULATED, z)


@pytest.mark.parametrize(
    "k, r, dtype, reason",
    [
        (64, 8, torch.float32, "takes bfloat16 and float16, got float32"),
        (64, 129, torch.bfloat16, "takes ranks up to 128, got 129"),
        (60, 8, torch.bfloat16, "multiples of 8, got K=60 and N=64"),
    ],
)
def test_refusals_say_why(k, r, dtype, reason):
    x, a, b = torch.randn(4, k).to(dtype), torch.randn(2, r, k).to(dtype), torch.randn(2, 64, r).to(dtype)
    with pytest.raises(afa.BackendUnavailable, match=reason):
        afa.afa_lora_grouped(x, torch.tensor([1, 4], dtype=torch.int32), a, b, 0.5, backend=EMULATED)


@pytest.mark.parametrize("r", [8, 16, 32, 64])
def test_scratch_memory_is_bounded(r):
    for k, n in ((4096, 4096), (2048, 768), (7168, 2048), (4096, 14336)):
        for rows in (1, 1024, 8192, 131072):
            bound = max(64 << 20, (k + n) * rows * 2 // 50)  # or 2% of x and y
            if r > 32:  # and dz, h and one sum of dh for all rows, where a lone call takes them in rounds
                bound += 8 * r * rows
            for groups in (1, 128):
                shape = (rows, k, n, r)
                assert emulator().ragged_forward_workspace(shape, groups) <= bound, (shape, groups)
                assert emulator().ragged_backward_workspace(shape, groups, True) <= bound, (shape, groups)


@pytest.mark.parametrize("r", [16, 32, 64, 128])
def test_launches_fit_the_device(r):
    for device in ((132, 227 << 10, 228 << 10), (170, 99 << 10, 100 << 10)):
        for rows in (1, 4096, 1 << 20):
            for launch in emulator().ragged_kernels((rows, 4096, 14336, r), 256, *device, rounded=True):
                assert launch["shared_bytes"] <= device[1] and 2 <= launch["stages"] <= 5


def launched(rows: int, r: int) -> str:
    call = Call(EMULATED, torch.bfloat16, rows, 4096, 4096, r, "silu", groups=8)
    return " ".join(launch["kernel"].removeprefix("ragged_") for launch in cuda._emulator_kernels().launches(call))


def test_what_is_launched():
    assert launched(8192, 16) == "forward dy x"
    assert launched(8192, 64) == "forward project_dy db x"
    assert launched(256, 32) == "project expand dy x"
    assert launched(1 << 17, 32) == "forward dy x"
