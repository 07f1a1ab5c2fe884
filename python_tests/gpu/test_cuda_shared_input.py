"""Layers that share x, as kernels of the CUDA backend: one launch for each pass, whatever the layers are like."""

import re

import pytest
import torch
from conformance.problems import Problem
from conformance.properties import keeps_the_bits_of_rows
from conformance.targets import CudaTarget
from conftest import skip_unless_available
from ptx_cuda import NAME, kernel_names, kernels, launches_of

from afa_kernels.backend import cuda
from afa_kernels.backend.interface import Call
from bench.model.gpus import CARDS


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available(NAME)


@pytest.mark.parametrize(
    "m, expected",
    [
        (75, ["pack", "project", "expand", "pack", "dy", "reduce", "x", "reduce"]),
        (6200, ["pack", "forward", "pack", "dy", "reduce", "x", "reduce"]),
    ],
)
def test_what_layers_launch(m, expected):
    """As many kernels as a lone layer has."""
    k, widths = (904, (264, 72, 72)) if m < 1000 else (16, (16, 8, 8))
    problem = Problem.of(torch.bfloat16, m, k, widths, (16, 8, 5), weights=torch.float32)
    assert kernel_names(launches_of(lambda: problem.run(kernels))) == expected


@pytest.mark.parametrize("shape", [(776, 8, 16), (264, 520, 64), (136, (584, 72, 72), (16, 16, 16))], ids=str)
def test_rows_by_one_block_or_several(shape):
    """Few rows have a block for each of the four segments of K; 48 tiles of rows have one that goes through all of
    them; and from 96 on it makes y too. Above rank 32 the sum over N has blocks as that over K has."""
    keeps_the_bits_of_rows(CudaTarget("sm_80"), Problem.of(torch.bfloat16, 96 * 64, *shape))


def test_x_is_read_once_for_all_layers():
    m, k, widths, ranks = 128, 512, (256, 64, 64), (16, 16, 16)
    problem, results = Problem.of(torch.bfloat16, m, k, widths, ranks, weights=torch.bfloat16), {}

    def copied(call) -> int:
        return sum(launch["async_copy_bytes"] for launch in launches_of(call))

    weights = 2 * (64 * k + 16 * sum(widths))  # packed: the rows of every A fill the class of ranks
    # Two tiles of rows read A and B.
    assert copied(lambda: results.update(problem.forward(kernels))) == 2 * m * k + 2 * weights
    slabs = k // 128  # of the x pass, each of which reads dz
    expected = 2 * m * (k + sum(widths)) + slabs * 2 * m * 64 + weights
    assert copied(lambda: problem.backward(kernels, results)) == expected


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
        module.launch_plan((64, 64, (64, 64), (16, 33)), *CARDS["sm_90"].planned_for)
    with pytest.raises(ValueError, match="up to 64 together, .*: M=64, K=64, N=64,64,64, r=17,8,30"):
        module.launch_plan((64, 64, (64,) * 3, (17, 8, 30)), *CARDS["sm_90"].planned_for)


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
