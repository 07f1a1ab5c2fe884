"""What the CUDA backend decides before it launches: kernels, grids, rings, scratch memory, and what it refuses.

The host code of ``cuda_ptx`` is that of ``cuda``, linked with a CUDA runtime whose devices the tests make up.
"""

import math

import pytest
import torch
from conftest import skip_unless_available
from helpers import Problem
from ptx_cuda import NAME, kernels, launches_of

import afa_kernels as afa
from bench.model.gpus import CARDS

RANKS = (5, 16, 32, 64)


@pytest.fixture
def native():
    """The compiled module."""
    skip_unless_available(NAME)
    return kernels._module


H100, A100, RTX = (CARDS[arch].planned_for for arch in ("sm_90", "sm_80", "sm_120"))


@pytest.mark.parametrize("device", [H100, A100, RTX], ids=["H100", "A100", "RTX-5090"])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("m", [1, 100, 4096, 1 << 20])
def test_launches_fit_the_device(native, m, r, device):
    for launch in native.launch_plan((m, 4096, 14336, r), *device):
        assert launch["shared_bytes"] <= device[1]
        assert launch["blocks_per_sm"] >= 1
        assert launch["blocks_per_sm"] * (launch["shared_bytes"] + 1024) <= device[2]
        assert 2 <= launch["stages"] <= 5
        assert 1 <= launch["grid"][1] <= 65535
        assert launch["waves"] > 0


@pytest.mark.parametrize("m", [1, 777, 8192])
@pytest.mark.parametrize("r", RANKS)
def test_the_order_of_sums_depends_on_the_shape_alone(native, m, r):
    """How many blocks share a sum. How many rows have a block of their own is no matter."""

    def sums(launch: dict) -> tuple:
        columns, shares = launch["grid"]
        return launch["kernel"], shares, columns if launch["kernel"] in ("dy", "db", "x") else None

    of_devices = [
        [sums(launch) for launch in native.launch_plan((m, 2048, 4096, r), *device)] for device in (H100, A100, RTX)
    ]
    assert of_devices[0] == of_devices[1] == of_devices[2]


# (K, N) of the linear layers of Llama 8B and 70B and of Qwen3 4B.
LAYERS = (
    (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192),
    (2560, 4096), (2560, 9728), (9728, 2560),
)  # fmt: skip


@pytest.mark.parametrize("r", RANKS)
def test_scratch_memory_does_not_grow_with_the_rows(native, r):
    for k, n in LAYERS:
        for m in (1, 1024, 8192, 131072):
            bound = max(64 << 20, (k + n) * m * 2 // 50)  # or 2% of x and y
            assert native.forward_workspace((m, k, n, r)) <= bound, (m, k, n)
            assert native.backward_workspace((m, k, n, r)) <= bound, (m, k, n)
    assert native.backward_workspace((300, 8, 1 << 29, r)) > 0  # one row alone has more than a round may


@pytest.mark.parametrize("device", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("r", [8, 16, 32])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (4096, 14336), (14336, 4096)])
def test_large_calls_leave_little_of_the_device_idle(native, k, n, r, device):
    """Of the time of all kernels, weighted by the elements that they stream. One number of chunks serves all GPUs."""
    for m in (4096, 8192, 16384, 131072):
        streamed = {"forward": k + n, "project": k, "expand": n, "dy": n, "x": 2 * k}
        spent = needed = 0
        for launch in native.launch_plan((m, k, n, r), *device):
            full = streamed[launch["kernel"]]
            waves = launch["waves"]
            needed += full
            spent += full * (max(1, math.ceil(waves) / waves) if waves > 1 else 1)
        assert spent <= 1.2 * needed, (m, k, n, r)


def test_few_rows_take_the_split_forward(native):
    def kernels(m):
        return [launch["kernel"] for launch in native.launch_plan((m, 4096, 4096, 16), *H100)]

    assert kernels(256) == ["project", "expand", "dy", "x"]
    assert kernels(8192) == ["forward", "dy", "x"]
    wide = [launch["kernel"] for launch in native.launch_plan((8192, 4096, 4096, 64), *H100)]
    assert wide == ["forward", "project_dy", "db", "x"]


def test_a_device_without_enough_shared_memory_is_named(native):
    with pytest.raises(
        ValueError,
        match=r"forward kernel: needs \d+ bytes of shared memory, the device gives 16384",
    ):
        native.launch_plan((64, 64, 64, 16), 10, 16 << 10, 16 << 10)


def test_plan_shows_the_launches(native):
    problem = Problem.random(64, 64, 64, 16, torch.bfloat16)
    plan = afa.plan(problem.x, problem.lora_a, problem.lora_b, 0.5, backend=NAME)
    assert plan.backend == NAME and plan.reason == "requested"
    assert [launch["kernel"] for launch in plan.launches] == ["forward", "dy", "x"]
    assert plan.launches[0]["grid"] == (1, 1)


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        ((4, 64, 64, 8), torch.float32, "takes bfloat16 and float16, got float32"),
        ((4, 64, 64, 65), torch.bfloat16, "takes ranks up to 64, got 65"),
        ((4, 60, 64, 8), torch.bfloat16, "multiples of 8, got K=60 and N=64"),
        ((4, 64, 63, 8), torch.float16, "multiples of 8, got K=64 and N=63"),
    ],
)
def test_refusals_say_why(native, shape, dtype, reason):
    problem = Problem.random(*shape, dtype)
    with pytest.raises(afa.BackendUnavailable, match=reason):
        afa.afa_lora(problem.x, problem.lora_a, problem.lora_b, 0.5, backend=NAME)


def test_the_machine_is_never_chosen_by_itself():
    problem = Problem.random(4, 64, 64, 8, torch.bfloat16)
    assert afa.plan(problem.x, problem.lora_a, problem.lora_b, 0.5).backend != NAME


@pytest.mark.parametrize("misaligned", ["x", "y", "base", "z", ""])
def test_misaligned_memory_is_refused_and_no_crash(native, misaligned):
    """The module does nothing with operands that the kernels cannot read. z is its own to lay out."""

    def empty(rows, cols, name):
        start = int(name == misaligned)
        return torch.zeros(rows * cols + start).bfloat16()[start:].view(rows, cols)

    x, z, y, base = empty(9, 64, "x"), empty(9, 16, "z"), empty(9, 64, "y"), empty(9, 64, "base")
    member = (torch.randn(16, 64).bfloat16(), torch.randn(64, 16).bfloat16(), torch.tensor(0.5), 1, 1.0)
    workspace = torch.empty(native.forward_workspace((9, 64, 64, 16)), dtype=torch.uint8)
    native.use_torch(torch)

    def launched():
        return native.forward(x, [member], [(base, y, z)], None, 0, workspace, 0, 0)

    if misaligned == "z":
        with pytest.raises(ValueError, match="z: expected an address that is a multiple of 4"):
            launched()
    else:
        done = []
        launches = launches_of(lambda: done.append(launched()))
        assert done == [not misaligned] and bool(launches) == (not misaligned)
