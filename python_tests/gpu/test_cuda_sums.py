"""dA and dB of the CUDA kernels, sums over rows: in one chunk or several, in one round of rows or several, whatever
else is needed."""

import itertools

import pytest
import torch
from conformance.problems import Problem
from conftest import skip_unless_available
from ptx_cuda import NAME, kernel_names, kernels, launches_of, limited

from bench.model.gpus import CARDS

H100 = CARDS["sm_90"].planned_for
# M, K, N, r; the chunks of rows in the passes over x and over dy.
LAYERS = {
    "one chunk": ((40, 136, 264, 5), (1, 1)),
    "several": ((200, 712, 264, 16), (4, 2)),
    "rank 32": ((300, 392, 264, 29), (3, 3)),
    "rank 64": ((200, 136, 264, 64), (2, 2)),
    "rank 64, dh by its segments": ((330, 136, 520, 50), (3, 3)),
}


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available(NAME)


@pytest.mark.parametrize("which", LAYERS)
def test_chunks(which):
    layer, chunks = LAYERS[which]
    plan = {row["kernel"]: row for row in kernels._module.launch_plan(layer, *H100)}
    of_db = plan["db"] if "db" in plan else plan["dy"]
    assert (plan["x"]["grid"][1], of_db["grid"][1]) == chunks


def expected_launches(r: int, need: tuple[bool, bool, bool]) -> list[str]:
    """Return the kernels of a backward that has z."""
    need_dx, need_da, need_db = need
    need_dz = need_dx or need_da
    x = ["x"] * need_dz
    if r <= 32:
        return ["dy", "reduce", *x, *["reduce"] * need_da]
    return [*["project_dy"] * need_dz, "reduce", *["db"] * need_db, *x, *["reduce"] * (need_da or need_db)]


@pytest.mark.parametrize("need", [n for n in itertools.product((True, False), repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("which", ["several", "rank 64, dh by its segments"])
def test_a_backward_launches_what_is_needed(which, need):
    """And a gradient has the same bits whatever else is needed."""
    layer, _ = LAYERS[which]
    problem = Problem.of(torch.bfloat16, *layer)
    full, got = problem.run(kernels), {}
    needed = {name for name, one in zip(("dx", "da0", "db0"), need, strict=True) if one}
    launches = kernel_names(launches_of(lambda: got.update(problem.run(kernels, need=needed))))
    backward = [name for name in launches if name not in ("pack", "forward", "project", "expand")]
    assert backward == expected_launches(layer[3], need)
    for name in ("dx", "da0", "db0"):
        assert (got[name] is not None) == (name in needed)
        assert name not in needed or torch.equal(got[name], full[name])


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("which", LAYERS)
def test_gradients_against_float64(which, weights):
    problem = Problem.of(torch.bfloat16, *LAYERS[which][0], weights=weights)
    problem.check(problem.run(kernels))


@pytest.mark.parametrize("limits", [{"round_limit": 128}, {"chunk_limit": 1, "round_limit": 128}], ids=str)
@pytest.mark.parametrize("which", ["several", "rank 32", "rank 64, dh by its segments"])
def test_rounds_of_rows_against_float64(which, limits):
    """dx has the same bits as in one round."""
    problem = Problem.of(torch.bfloat16, *LAYERS[which][0], weights=torch.float32)
    whole = problem.run(kernels)
    with limited(**limits):
        got = problem.run(kernels)
    assert torch.equal(got["dx"], whole["dx"])
    problem.check(got)


@pytest.mark.parametrize("shape", [(20, 4104, 72, 16), (20, 4104, 4104, 64), (6100, 648, 648, 16)], ids=str)
def test_blocks_with_more_tiles_than_stages(shape):
    """Of x, dy and y: in a segment of a sum, and where one block makes whole rows."""
    problem = Problem.of(torch.bfloat16, *shape)
    problem.check(problem.run(kernels))
