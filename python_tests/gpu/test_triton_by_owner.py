"""Rows by owner of the Triton backend in Triton's interpreter: which kernels run, and what they find. conformance/ has
the numbers. What is compiled is in test_triton_compile.py, and what that computes in test_ptx_triton.py."""

from unittest import mock

import pytest
import torch
from conformance.problems import Problem

from afa_kernels.backend.interface import Rows
from afa_kernels.backend.triton import backend

pytest.importorskip("triton")

from afa_kernels.backend.triton import configs, launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreter")

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
    problem = Problem.of_owners(torch.float16, (40, 0, 30), 300, 270, r, behind=2, ranks=ranks)
    for multiprocessors, paths in ((1, PATHS), (108, SPLIT_PATHS)):
        with launch.recording(configs.Device(configs.INTERPRETER, multiprocessors)) as launches:
            problem.run(backend.BACKEND)
        names = [entry.name.removesuffix("_kernel").removesuffix("_backward").removesuffix("_forward")
                 for entry in launches]  # fmt: skip
        assert names == list(paths[r])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_a_program_for_an_owner_or_for_each_of_its_chunks(dtype):
    """Bits do not depend on how the sums over an owner's rows are spread over programs: 200 rows in tiles of 32 are two
    chunks of four and three tiles."""
    problem, results = Problem.of_owners(dtype, (3, 200, 0, 65), 40, 24, 16, behind=5), []
    for multiprocessors, parts in ((108, 2), (1, 1)):
        device = configs.Device(configs.INTERPRETER, multiprocessors)
        with mock.patch.object(configs, "device_of", lambda _, device=device: device):
            with launch.recording(device) as launches:
                problem.run(backend.BACKEND)
            assert {e.arguments["parts"] for e in launches if "parts" in e.arguments} == {parts}
            results.append(problem.run(backend.BACKEND))
    for name, t in results[0].items():
        assert torch.equal(t, results[1][name]), name


def test_owners_are_found_among_more_than_one_program_reads_at_a_time():
    sizes = [g % 3 if g % 7 else 0 for g in range(300)]  # 256 offsets at a time
    problem = Problem.of_owners(torch.float32, sizes, 4, 3, 2, behind=4, alphas=(0.3, 0.6))
    problem.check(problem.run(backend.BACKEND))


def test_offsets_that_break_their_contract_write_nothing_outside():
    """On a GPU nothing checks their values. Guards of NaN around y and dx stay."""
    problem = Problem.of_owners(torch.float32, (10, 20, 10), 24, 16, 16)
    (o,), around = problem.outputs, torch.full((60, 16), torch.nan)
    for offsets in ((100, 7, 2000), (-50, 20, 10), (30, 10, -1), (2**31 - 1, -(2**31), 40)):
        rows = Rows(torch.tensor(offsets, dtype=torch.int32), None, None)
        call = (problem.x, o.a, o.b, o.alpha_t, None, o.spec, rows)
        z = backend.BACKEND.forward(*call, base=None, out=around[10:50], save_z=True)
        assert z.shape == (40, 16) and around[:10].isnan().all() and around[50:].isnan().all()


@pytest.mark.parametrize("scaling", [0.1, 1 / 3, 3e-5, 7.0])
def test_the_factor_of_dz_is_that_of_a_scaling_for_all_owners(scaling):
    """A scaling on the device is divided by what dropout keeps there, with the bits that the host gives."""
    scaling = torch.tensor(scaling).item()  # exact in float32
    for threshold in (1, 26, 100, 255):
        problem, results = Problem.of_owners(torch.float32, (10, 30), 24, 16, 16, dropout=threshold), []
        (o,), rows = problem.outputs, problem.rows
        for spec, each in ((o.spec._replace(scaling=scaling), None), (o.spec, torch.full((2,), scaling))):
            o.spec, problem.rows = spec, rows._replace(scaling=each)
            results.append(problem.run(backend.BACKEND))
        for name in ("dx", "da0", "db0"):
            assert torch.equal(results[0][name], results[1][name]), name
