"""What nvcc makes of the ragged CUDA kernels, on the PTX machine and the simulated runtime."""

import re

import ptx_cuda
import ptx_problems
import ptx_runtime_helpers
import pytest
import torch
from cuda_ragged import RESULTS, Ragged, assert_bits, assert_rounded_with_dx
from ptx_ragged_problems import RandomRaggedProblem
from ptx_runtime_helpers import cuda_on_ptx

_a_sound_machine, kept_allocations = ptx_runtime_helpers.sound_machine, ptx_runtime_helpers.kept_allocations


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1)


def test_every_kernel_runs():
    for dtype in (torch.bfloat16, torch.float16):
        for r, rows in ((16, 520), (20, 30), (40, 30), (128, 30)):
            for n in (24, 264 if r > 64 else 520):  # one pass; the split forward
                p = Ragged([rows, 0, 3], 16, n, r, dtype)
                z = p.forward(ptx_cuda.NAME)[1]
                p.backward(ptx_cuda.NAME, z)
                p.backward(ptx_cuda.NAME, z, dx=torch.zeros_like(p.x))
    launched = {launch["kernel"] for launch in cuda_on_ptx.take_launches()}
    assert launched == {name for name in cuda_on_ptx.kernel_names() if "ragged" in name}


@pytest.mark.parametrize("number", range(8))
def test_compiled_kernels(number):
    where = ptx_problems.CudaTarget(list(ptx_cuda.DEVICES)[number // 4])
    with where.running():
        RandomRaggedProblem(where, number + 100).check()
    assert {launch["device"] for launch in cuda_on_ptx.take_launches()} == {number // 4}


@pytest.mark.parametrize("number", range(8))
def test_compiled_kernels_that_add_to_dx(number):
    where = ptx_problems.CudaTarget(list(ptx_cuda.DEVICES)[number // 4])
    results = []
    with where.running():
        problem = RandomRaggedProblem(where, number + 200).problem
        for schedule in (number, number + 1000):
            where.set_seed(schedule)
            torch.manual_seed(number)
            results.append(problem.check_adding(ptx_cuda.NAME)[1])
    assert torch.equal(*(dx[: problem.rows] for dx in results)), "depends on the schedule"
    assert {launch["device"] for launch in cuda_on_ptx.take_launches()} == {number // 4}


def test_what_compiled_kernels_add_to_dx_is_rounded_with_it():
    assert_rounded_with_dx(ptx_cuda.NAME)


def test_compiled_kernels_with_several_chunks():
    p = Ragged([600, 3, 515], 16, 24, 8, behind=2, weights=torch.float32)
    got = p.check(ptx_cuda.NAME)
    alone = p.alone(2).run(ptx_cuda.NAME)
    assert torch.equal(got["da"][2], alone["da"][0]) and torch.equal(got["db"][2], alone["db"][0])


# The word of shared memory in which a block finds its group.
FOUND = re.compile(r"ld\.shared\.u32\s+(%r\d+), \[\w+afa_shared\w*\];")
PLANTED = {
    "no barrier": lambda text: re.sub(r"bar\.sync[^;]*;", "", text),
    "every block is one of the first group": lambda text: FOUND.sub(r"mov.u32 \1, 0;", text),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_noticed(fault):
    p = Ragged([30, 0, 65], 72, 80, 16, activation="relu")
    right, texts = p.run(ptx_cuda.NAME), []

    def edit(text: str) -> str:
        texts.append((text, PLANTED[fault](text)))
        return texts[-1][1]

    cuda_on_ptx.set_edit(edit)
    try:
        wrong = p.run(ptx_cuda.NAME)
    except RuntimeError:
        wrong = {}
    assert any(before != after for before, after in texts)
    assert any(what not in wrong or not torch.equal(right[what], wrong[what]) for what in RESULTS)


def test_a_captured_call_follows_its_groups(kept_allocations):
    """Offsets, ranks, alpha_t and scaling are read on the device, each time that the graph runs."""
    p = Ragged([30, 0, 65, 2], 72, 80, 16, behind=20, ranks=[16, 16, 7, 0], scaling="of groups", activation="relu")
    p.x.nan_to_num_(), p.dy.nan_to_num_(), p.a.nan_to_num_(), p.b.nan_to_num_()
    runtime = cuda_on_ptx.runtime
    runtime.begin_capture(7)
    with ptx_cuda.kernels.on(0, 7):
        y, z = p.forward(ptx_cuda.NAME)
        gradients = p.backward(ptx_cuda.NAME, z)
    graph = runtime.end_capture()
    assert len(graph) >= 4 and y.isnan().all() and not cuda_on_ptx.take_launches(), "a capture runs nothing"
    for ends in ([30, 30, 95, 97], [0, 117, 117, 117], [1, 2, 3, 4]):
        p.ends.copy_(torch.tensor(ends))
        p.groups.ranks.copy_(p.groups.ranks.flip(0))
        p.groups.alpha_t.mul_(0.5), p.groups.scaling.mul_(0.5)
        graph.replay()
        expected = p.run(ptx_cuda.NAME)
        assert_bits(dict(zip(RESULTS, (y, z, *gradients), strict=True)), expected, ends)
