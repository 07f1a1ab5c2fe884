"""dA and dB of the CUDA kernels, sums over rows: in one chunk or several, in one round of rows or several, whatever
else is needed."""

import itertools

import pytest
import torch
from conftest import skip_unless_available
from helpers import Problem, assert_as_accurate_as_torch, eager, poisoned_memory
from native_helpers import assert_accurate as assert_call
from native_helpers import problem as operands_of
from native_helpers import run, truth_of
from ptx_cuda import NAME, forward_and_backward, kernel_names, kernels, launches_of, limited

from afa_kernels.backend import torch as torch_ops
from afa_kernels.operator.options import Spec

H100 = (132, 227 << 10, 228 << 10)
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
    problem = Problem.random(*layer, torch.bfloat16)
    full, got = forward_and_backward(problem), []
    with poisoned_memory():
        launches = kernel_names(launches_of(lambda: got.extend(forward_and_backward(problem, need=need))))
    backward = [name for name in launches if name not in ("pack", "forward", "project", "expand")]
    assert backward == expected_launches(layer[3], need)
    for gradient, every, needed in zip(got[2:], full[2:], need, strict=True):
        assert (gradient is not None) == needed
        assert not needed or torch.equal(gradient, every)


def gradients(problem: Problem, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return dx, dA and dB in torch ops."""
    x = problem.x.to(dtype).requires_grad_()
    weights = [w.to(problem.x.dtype).to(dtype).requires_grad_() for w in (problem.lora_a, problem.lora_b)]
    y = eager(x, *weights, 0.3, scaling=1.5, base=problem.base.to(dtype))
    y.backward(problem.dy.to(dtype))
    return [x.grad, *(w.grad for w in weights)]


def assert_accurate(problem: Problem, got: list[torch.Tensor]) -> None:
    truth, torch_ops = (gradients(problem, dtype) for dtype in (torch.float64, torch.bfloat16))
    for what, value, exact, yardstick in zip(("dx", "da", "db"), got, truth, torch_ops, strict=True):
        assert_as_accurate_as_torch(value.to(yardstick.dtype), yardstick, exact, what, torch.bfloat16)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("which", LAYERS)
def test_gradients_against_float64(which, weights):
    layer, _ = LAYERS[which]
    problem = Problem.random(*layer, torch.bfloat16, adapter_dtype=weights)
    with poisoned_memory():
        _, _, dx, da, db = forward_and_backward(problem)
    assert da.dtype == db.dtype == weights
    assert_accurate(problem, [dx, da, db])


@pytest.mark.parametrize("limits", [{"round_limit": 128}, {"chunk_limit": 1, "round_limit": 128}], ids=str)
@pytest.mark.parametrize("which", ["several", "rank 32", "rank 64, dh by its segments"])
def test_rounds_of_rows_against_float64(which, limits):
    """dx has the same bits as in one round."""
    problem = Problem.random(*LAYERS[which][0], torch.bfloat16, adapter_dtype=torch.float32)
    with poisoned_memory():
        whole = forward_and_backward(problem)
        with limited(**limits):
            got = forward_and_backward(problem)
    assert torch.equal(got[2], whole[2])
    assert_accurate(problem, list(got[2:]))


@pytest.mark.parametrize("shape", [(20, 4104, 72, 16), (20, 4104, 4104, 64), (6100, 648, 648, 16)], ids=str)
def test_blocks_with_more_tiles_than_stages(shape):
    """Of x, dy and y: in a segment of a sum, and where one block makes whole rows."""
    operands, spec = operands_of(*shape, torch.bfloat16), Spec("silu", 1.5)
    with poisoned_memory():
        got = run(*operands, spec, backend=kernels)
    assert_call(got, run(*operands, spec, backend=torch_ops.BACKEND), truth_of(*operands, spec), torch.bfloat16)
