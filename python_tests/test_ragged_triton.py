"""Rows by owner of the Triton backend in Triton's interpreter. What it compiles is in test_triton_compile.py, and what
that computes in test_ptx_triton.py."""

import pytest
import torch
from conftest import SIMULATED, skip_unless_available
from helpers import poisoned_memory
from ragged_calls import assert_rounded_with_dx, random_problem
from ragged_gpu_problems import RaggedProblem
from ragged_helpers import Owners

import afa_kernels as afa
from afa_kernels.backend.interface import Call
from afa_kernels.backend.triton import backend
from afa_kernels.operator.options import Spec


@pytest.fixture(autouse=True)
def _interpreter():
    skip_unless_available("triton")
    if "triton" not in SIMULATED:
        pytest.skip("not in the interpreter: TRITON_INTERPRET is not 1")


# A third of them in `make test`: the interpreter takes half a second for one.
@pytest.mark.parametrize("first", [pytest.param(n, marks=[pytest.mark.slow] * (n >= 100)) for n in range(0, 300, 10)])
@pytest.mark.filterwarnings("ignore:overflow encountered")  # of numpy, in a sigmoid
def test_random_problems(first):
    for number in range(first, first + 10):
        problem = RaggedProblem(number, 40, 40, (1, 5, 16, 33), dtypes=("f16", "f32"))
        try:
            with poisoned_memory():
                got = problem.check()
                if number % 6 == 0:
                    problem.check_groups_alone(got)
        except Exception as error:
            raise AssertionError(str(problem)) from error


@pytest.mark.parametrize("number", range(8))
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_problems_that_add_to_dx(number):
    random_problem(number, sizes=(0, 1, 17, 65), dtypes=(torch.float16,)).check_adding("triton")


def test_what_is_added_to_dx_is_rounded_with_it():
    assert_rounded_with_dx("triton", torch.float16)


@pytest.fixture
def large_device(monkeypatch):
    """A device that the owners of a test do not fill."""
    from afa_kernels.backend.triton import configs

    monkeypatch.setattr(configs, "device_of", lambda _: configs.Device(configs.INTERPRETER, 108))


def operands(sizes, behind, k, n, r, dtype=torch.float32):
    rows, owners = sum(sizes) + behind, len(sizes)
    offsets = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x, dy = torch.randn(rows, k, dtype=dtype), torch.randn(rows, n, dtype=dtype)
    a, b = torch.randn(owners, r, k, dtype=dtype), torch.randn(owners, n, r, dtype=dtype)
    return x, dy, a * k**-0.5, b * r**-0.5, Owners(offsets, None, torch.full((1,), 0.3).expand(owners), None)


def forward_and_backward(x, dy, a, b, owners):
    spec = Spec("silu", 2.0)
    y = torch.full_like(dy, torch.nan)
    z = backend.BACKEND.forward(x, a, b, owners.alpha_t, None, spec, owners.rows, base=None, out=y, save_z=True)
    needs = {"need_dx": True, "need_da": True, "need_db": True}
    return y, z, *backend.BACKEND.backward(dy, x, a, b, z, owners.alpha_t, None, spec, owners.rows, **needs)


# Names of the kernels of a forward and a backward, by whether the rows fill the device.
PATHS = {
    16: ("xa_phi_hb", "dy_pass", "dphi", "x_pass", "weight_gradients"),
    40: ("pack", "xa_phi_hb", "pack", "dyb_dphi", "dy_pass", "x_pass", "weight_gradients"),
}
SPLIT_PATHS = {
    16: ("project_partial", "phi_hb", "dy_pass", "dphi", "x_pass", "weight_gradients"),
    40: ("pack", "project_partial", "phi_hb", "pack", "project_partial", "dphi", "dy_pass", "x_pass",
         "weight_gradients"),
}  # fmt: skip


@pytest.mark.parametrize("ranks", [None, (7, 0, 16)], ids=["one rank", "ranks"])
@pytest.mark.parametrize("r", PATHS)
def test_launches(r, ranks):
    """As many as those of a call with one A and B, and the same where rows fill the device as where they do not."""
    from afa_kernels.backend.triton import configs, launch

    x, dy, a, b, owners = operands((40, 0, 30), 2, 300, 270, r)
    if ranks is not None:
        owners = owners._replace(ranks=torch.tensor(ranks, dtype=torch.int32))
    for multiprocessors, paths in ((1, PATHS), (108, SPLIT_PATHS)):
        with launch.recording(configs.Device(configs.INTERPRETER, multiprocessors)) as launches:
            forward_and_backward(x.half(), dy.half(), a, b, owners)
        names = [entry.name.removesuffix("_kernel").removesuffix("_backward").removesuffix("_forward")
                 for entry in launches]  # fmt: skip
        assert names == list(paths[r])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_a_program_for_an_owner_or_for_each_of_its_chunks(dtype, large_device):
    """Bits do not depend on how the sums over an owner's rows are spread over programs: 200 rows in tiles of 32 are two
    chunks of four and three tiles."""
    from afa_kernels.backend.triton import configs, launch

    given = operands((3, 200, 0, 65), 5, 40, 24, 16, dtype)
    many = forward_and_backward(*given)
    with launch.recording(configs.device_of(given[0].device)) as launches:
        forward_and_backward(*given)
    assert {e.arguments["parts"] for e in launches if "parts" in e.arguments} == {2}
    configs.device_of = lambda _: configs.Device(configs.INTERPRETER, 1)
    with launch.recording(configs.device_of(given[0].device)) as launches:
        forward_and_backward(*given)
    assert {e.arguments["parts"] for e in launches if "parts" in e.arguments} == {1}
    for one, other in zip(many, forward_and_backward(*given), strict=True):
        assert torch.equal(one, other)


def test_owners_are_found_among_more_than_one_program_reads_at_a_time():
    owners = 300  # 256 offsets at a time
    sizes = [g % 3 if g % 7 else 0 for g in range(owners)]
    x, dy, a, b, given = operands(sizes, 4, 4, 3, 2)
    y, z, dx, da, db = forward_and_backward(x, dy, a, b, given)
    first = 0
    for owner, size in enumerate(sizes):
        rows, first = slice(first, first + size), first + size
        torch.testing.assert_close(z[rows], x[rows] @ a[owner].T, rtol=1e-5, atol=1e-5)
        if size == 0:
            assert not da[owner].any() and not db[owner].any()
    assert not z[first:].any() and not y[first:].any() and not dx[first:].any()


def test_offsets_that_break_their_contract_write_nothing_outside():
    """On a GPU nothing checks their values. Guards of NaN around y and dx stay."""
    x, dy, a, b, owners = operands((10, 20, 10), 0, 24, 16, 16)
    around = torch.full((60, 16), torch.nan)
    for offsets in ((100, 7, 2000), (-50, 20, 10), (30, 10, -1), (2**31 - 1, -(2**31), 40)):
        broken = owners._replace(offsets=torch.tensor(offsets, dtype=torch.int32))
        out = around[10:50]
        z = backend.BACKEND.forward(
            x, a, b, broken.alpha_t, None, Spec("silu", 2.0), broken.rows, base=None, out=out, save_z=True
        )
        assert z.shape == (40, 16) and around[:10].isnan().all() and around[50:].isnan().all()


@pytest.mark.parametrize("scaling", [0.1, 1 / 3, 3e-5, 7.0])
def test_the_factor_of_dz_is_that_of_a_scaling_for_all_owners(scaling):
    """A scaling on the device is divided by what dropout keeps there, with the bits that the host gives."""
    x, dy, a, b, owners = operands((10, 30), 0, 24, 16, 16)
    scaling = torch.tensor(scaling).item()  # exact in float32
    for threshold in (1, 26, 100, 255):
        seed, results = torch.tensor(5), []
        for each in (None, torch.full((2,), scaling)):
            spec = Spec("silu", scaling if each is None else 1.0, threshold)
            needs = {"need_dx": True, "need_da": True, "need_db": True}
            own = owners._replace(scaling=each)
            call = (own.alpha_t, seed, spec, own.rows)
            z = backend.BACKEND.forward(x, a, b, *call, base=None, out=torch.empty_like(dy), save_z=True)
            results.append(backend.BACKEND.backward(dy, x, a, b, z, *call, **needs))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_too_many_owners_are_refused_with_the_reason():
    call = Call("cpu", torch.float32, 8, 8, 8, 8, "silu", owners=5000)
    assert "5000 owners" in backend.BACKEND.refuses(call)
    assert backend.BACKEND.refuses(call._replace(owners=4000)) is None


def test_a_rank_that_is_too_large_is_refused():
    x, dy, a, b, owners = operands((3, 4), 0, 8, 8, 200)
    with pytest.raises(afa.BackendUnavailable, match="rank 200 is above 128"):
        afa.afa_lora(x, a, b, 0.5, offsets=owners.offsets, backend="triton")
