"""The CUDA kernels' source on the emulator: primitives, traffic, schedules, and what the launchers
decide.

The numeric tests of test_numerics.py run on ``cuda_emulated`` as well; here are the ones that only
the emulator can do. What callers may hand over is in test_cuda_operands.py.
"""

import math

import numpy as np
import pytest
import torch
from conftest import skip_unless_available
from emulator_helpers import forward_and_backward, same
from helpers import Problem

import afa_kernels as afa
from afa_kernels.backend import choice, cuda
from afa_kernels.operator.options import Spec

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
RANKS = (5, 16, 32, 64)
SCHEDULES = ("random", "warp_priority", "ascending", "descending")


@pytest.fixture(autouse=True)
def _emulator():
    skip_unless_available("cuda_emulated")


@pytest.fixture
def emulator():
    """The native module, with its options put back afterwards."""
    module, _ = cuda._emulator_module()
    yield module
    module.set_options("random", 1)
    module.set_device_limits(132, 227 << 10, 228 << 10)


# --- Primitives, against the layouts that the vendor documents, in another formulation than the
# emulator's ---


def primitive_check(module, dtype):
    bits = {"bf16": 0, "f16": 1}
    matrices = torch.randn(32, 16).to(DTYPES[dtype])
    values = torch.randn(128) * 3
    out = torch.zeros(608, dtype=torch.int32)
    module.primitive_check(bits[dtype], matrices.data_ptr(), values.data_ptr(), out.data_ptr(), 0, 0)
    return matrices, values, out


def layout(shape, stride):
    """Return the offsets of a CuTe layout given as flat shapes and strides, first mode fastest."""
    offsets = np.zeros(shape[::-1], dtype=int)
    for axis, step in enumerate(stride):
        view = [1] * len(shape)
        view[len(shape) - 1 - axis] = shape[axis]
        offsets = offsets + np.arange(shape[axis]).reshape(view) * step
    return offsets.reshape(-1)


# SM80_16x8x16: (thread (4, 8), value (2, 2, 2)) -> column-major offset in A (16 x 16), B (8 x 16)
# and C (16 x 8).
A_LAYOUT = layout((4, 8, 2, 2, 2), (32, 1, 16, 8, 128)).reshape(8, 32).T
B_LAYOUT = layout((4, 8, 2, 2), (16, 1, 8, 64)).reshape(4, 32).T
C_LAYOUT = layout((4, 8, 2, 2), (32, 1, 16, 8)).reshape(4, 32).T


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_loads_match_the_documented_fragments(emulator, dtype):
    matrices, _, out = primitive_check(emulator, dtype)
    loaded = out[:128].view(torch.int16).view(32, 8).view(DTYPES[dtype])
    expected = matrices[:16].T.reshape(-1)[torch.from_numpy(A_LAYOUT)]
    assert torch.equal(loaded, expected)
    # Transposed and counted right first, the second matrix (k, n) becomes the A operand (n, k) of
    # its transpose.
    transposed = out[128:256].view(torch.int16).view(32, 8).view(DTYPES[dtype])
    expected = matrices[16:].reshape(-1)[torch.from_numpy(A_LAYOUT)]
    assert torch.equal(transposed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_add_matches_the_documented_fragments(emulator, dtype):
    _, values, out = primitive_check(emulator, dtype)
    to_double = lambda words: words.view(torch.int16).view(DTYPES[dtype]).double()  # noqa: E731
    a = torch.zeros(256, dtype=torch.float64)
    a[torch.from_numpy(A_LAYOUT)] = to_double(out[:128].contiguous()).view(32, 8)
    b = torch.zeros(128, dtype=torch.float64)
    b[torch.from_numpy(B_LAYOUT)] = to_double(out[128:256].contiguous()).view(32, 8)[:, :4]
    c = torch.zeros(128, dtype=torch.float64)
    c[torch.from_numpy(C_LAYOUT)] = values.double().view(32, 4)
    # Column-major offsets: the transposes of the views.
    product = c.view(8, 16).T + a.view(16, 16).T @ b.view(16, 8)
    got = out[256:384].view(torch.float32).view(32, 4)
    expected = product.T.reshape(-1)[torch.from_numpy(C_LAYOUT)]
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_match_torch(emulator, dtype):
    matrices, values, out = primitive_check(emulator, dtype)
    assert torch.equal(out[384:416].view(torch.int16).view(DTYPES[dtype]), values[:64].to(DTYPES[dtype]))
    assert torch.equal(out[416:480].view(torch.float32), matrices.view(-1)[:64].float())


@pytest.mark.parametrize("special", [0.0, -0.0, 1e-8, 6e-8, 2**-14, 65504.0, 65519.0, 65520.0, 3e38])
def test_conversion_of_special_values(emulator, special):
    for dtype in DTYPES:
        matrices = torch.zeros(32, 16).to(DTYPES[dtype])
        values = torch.full((128,), special) * torch.tensor([1.0, -1.0]).repeat(64)
        out = torch.zeros(608, dtype=torch.int32)
        emulator.primitive_check(int(dtype == "f16"), matrices.data_ptr(), values.data_ptr(), out.data_ptr(), 0, 0)
        got = out[384:416].view(torch.int16)
        assert torch.equal(got, values[:64].to(DTYPES[dtype]).view(torch.int16)), dtype


def test_asynchronous_copy_fills_with_zeros(emulator):
    matrices, _, out = primitive_check(emulator, "bf16")
    expected = matrices.view(torch.int32).reshape(-1)[:128].view(32, 4).clone()
    expected[::3] = 0
    assert torch.equal(out[480:608].view(32, 4), expected)


# --- Results that must not depend on what may vary ---


@pytest.mark.parametrize("r", RANKS)
def test_schedules_and_devices_agree_bit_for_bit(emulator, r):
    problem = Problem.random(75, 144, 136, r, torch.bfloat16)
    results = []
    for schedule in SCHEDULES:
        emulator.set_options(schedule, len(results))
        results.append(forward_and_backward(problem))
    emulator.set_device_limits(48, 99 << 10, 100 << 10)  # rings of other depths
    results.append(forward_and_backward(problem))
    for other in results[1:]:
        assert same(results[0], other)


@pytest.mark.parametrize("k", [144, 904], ids=["one-pass", "split"])
@pytest.mark.parametrize("r", [16, 64])
def test_recomputed_z_gives_the_same_bits(k, r):
    problem = Problem.random(40, k, 136, r, torch.float16)
    seed, spec = torch.tensor(7), Spec("gelu", 0.7, 50)
    saved = forward_and_backward(problem, seed=seed, spec=spec)
    recomputed = forward_and_backward(problem, seed=seed, spec=spec, save_z=False)
    assert saved[1] is not None and recomputed[1] is None
    assert same(saved[2:], recomputed[2:])


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_needed(need, r):
    problem = Problem.random(70, 72, 80, r, torch.bfloat16)
    seed, spec = torch.tensor(3), Spec("silu", 2.0, 77)
    everything = forward_and_backward(problem, seed=seed, spec=spec)[2:]
    some = forward_and_backward(problem, seed=seed, spec=spec, need=tuple(map(bool, need)))[2:]
    for wanted, full, got in zip(need, everything, some, strict=True):
        assert (got is None) == (not wanted)
        assert got is None or torch.equal(got, full)


# --- What the kernels move, and how they are launched ---


def test_traffic_is_one_pass_over_each_large_matrix(emulator):
    m, k, n, r = 128, 256, 512, 16
    problem = Problem.random(m, k, n, r, torch.bfloat16)
    emulator.reset_counters()
    y = torch.empty_like(problem.base)
    operands = (
        problem.x,
        problem.lora_a,
        problem.lora_b,
        torch.tensor(0.3),
        None,
        Spec("silu", 1.5),
    )
    z = choice.get("cuda_emulated").forward(*operands, base=None, out=y, save_z=True)
    forward = emulator.counters()
    rows, weights = 2, 2 * (r * k + r * n)  # tiles of 64 rows, each of which reads A and B
    splits = 4 * 2 * m * r * 4  # partial z, written once per split and read per column block
    assert forward["async_copy_bytes"] == 2 * m * k + rows * weights
    assert 2 * m * (n + r) <= forward["global_write_bytes"] <= 2 * m * (n + r) + splits
    emulator.reset_counters()
    choice.get("cuda_emulated").backward(
        problem.dy, *operands[:3], z, *operands[3:], need_dx=True, need_da=True, need_db=True
    )
    backward = emulator.counters()
    # x, dy and dz once; B once per chunk of 128 rows, A once per chunk of 64.
    assert backward["async_copy_bytes"] == 2 * m * (k + n + r) + 2 * r * n + 2 * 2 * r * k
    assert forward["bank_conflicts"] == backward["bank_conflicts"] == 0


@pytest.mark.parametrize("r", RANKS)
def test_no_bank_conflicts_in_matrix_loads(emulator, r):
    emulator.reset_counters()
    forward_and_backward(
        Problem.random(70, 136, 584, r, torch.bfloat16),
        seed=torch.tensor(1),
        spec=Spec("relu", 1.0, 9),
    )
    counters = emulator.counters()
    assert counters["matrix_loads"] > 0 and counters["bank_conflicts"] == 0


H100, A100, RTX = (
    (132, 227 << 10, 228 << 10),
    (108, 163 << 10, 164 << 10),
    (170, 99 << 10, 100 << 10),
)


@pytest.mark.parametrize("device", [H100, A100, RTX], ids=["H100", "A100", "RTX-5090"])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("m", [1, 100, 4096, 1 << 20])
def test_launches_fit_the_device(emulator, m, r, device):
    for launch in emulator.launch_plan((m, 4096, 14336, r), *device):
        assert launch["shared_bytes"] <= device[1]
        assert launch["blocks_per_sm"] >= 1
        assert launch["blocks_per_sm"] * (launch["shared_bytes"] + 1024) <= device[2]
        assert 2 <= launch["stages"] <= 5
        assert 1 <= launch["grid"][1] <= 65535
        assert launch["waves"] > 0


@pytest.mark.parametrize("m", [1, 777, 8192])
@pytest.mark.parametrize("r", RANKS)
def test_the_order_of_sums_depends_on_the_shape_alone(emulator, m, r):
    """How many blocks share a sum. How many rows have a block of their own is no matter."""

    def sums(launch: dict) -> tuple:
        columns, shares = launch["grid"]
        return launch["kernel"], shares, columns if launch["kernel"] in ("dy", "db", "x") else None

    of_devices = [
        [sums(launch) for launch in emulator.launch_plan((m, 2048, 4096, r), *device)] for device in (H100, A100, RTX)
    ]
    assert of_devices[0] == of_devices[1] == of_devices[2]


# (K, N) of the linear layers of Llama 8B and 70B and of Qwen3 4B.
LAYERS = (
    (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192),
    (2560, 4096), (2560, 9728), (9728, 2560),
)  # fmt: skip


@pytest.mark.parametrize("r", RANKS)
def test_scratch_memory_does_not_grow_with_the_rows(emulator, r):
    for k, n in LAYERS:
        for m in (1, 1024, 8192, 131072):
            bound = max(64 << 20, (k + n) * m * 2 // 50)  # or 2% of x and y
            assert emulator.forward_workspace((m, k, n, r)) <= bound, (m, k, n)
            assert emulator.backward_workspace((m, k, n, r), True) <= bound, (m, k, n)
    assert emulator.backward_workspace((300, 8, 1 << 29, r), True) > 0  # one row alone has more than a round may


@pytest.mark.parametrize("device", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("r", [8, 16, 32])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (4096, 14336), (14336, 4096)])
def test_large_calls_leave_little_of_the_device_idle(emulator, k, n, r, device):
    """Of the time of all kernels, weighted by the elements that they stream. One number of chunks serves all GPUs."""
    for m in (4096, 8192, 16384, 131072):
        streamed = {"forward": k + n, "project": k, "expand": n, "dy": n, "x": 2 * k}
        spent = needed = 0
        for launch in emulator.launch_plan((m, k, n, r), *device):
            full = streamed[launch["kernel"]]
            waves = launch["waves"]
            needed += full
            spent += full * (max(1, math.ceil(waves) / waves) if waves > 1 else 1)
        assert spent <= 1.2 * needed, (m, k, n, r)


def test_few_rows_take_the_split_forward(emulator):
    def kernels(m):
        return [launch["kernel"] for launch in emulator.launch_plan((m, 4096, 4096, 16), *H100)]

    assert kernels(256) == ["project", "expand", "dy", "x"]
    assert kernels(8192) == ["forward", "dy", "x"]
    wide = [launch["kernel"] for launch in emulator.launch_plan((8192, 4096, 4096, 64), *H100)]
    assert wide == ["forward", "project_dy", "db", "x"]


def test_a_device_without_enough_shared_memory_is_named(emulator):
    with pytest.raises(
        ValueError,
        match=r"forward kernel: needs \d+ bytes of shared memory, the device gives 16384",
    ):
        emulator.launch_plan((64, 64, 64, 16), 10, 16 << 10, 16 << 10)


def test_plan_shows_the_launches():
    problem = Problem.random(64, 64, 64, 16, torch.bfloat16)
    plan = afa.plan(problem.x, problem.lora_a, problem.lora_b, 0.5, backend="cuda_emulated")
    assert plan.backend == "cuda_emulated" and plan.reason == "requested"
    assert [launch["kernel"] for launch in plan.launches] == ["forward", "dy", "x"]
    assert plan.launches[0]["grid"] == (1, 1)


# --- Refusals ---


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        ((4, 64, 64, 8), torch.float32, "takes bfloat16 and float16, got float32"),
        ((4, 64, 64, 65), torch.bfloat16, "takes ranks up to 64, got 65"),
        ((4, 60, 64, 8), torch.bfloat16, "multiples of 8, got K=60 and N=64"),
        ((4, 64, 63, 8), torch.float16, "multiples of 8, got K=64 and N=63"),
    ],
)
def test_refusals_say_why(shape, dtype, reason):
    problem = Problem.random(*shape, dtype)
    with pytest.raises(afa.BackendUnavailable, match=reason):
        afa.afa_lora(problem.x, problem.lora_a, problem.lora_b, 0.5, backend="cuda_emulated")


def test_it_is_never_chosen_by_itself():
    problem = Problem.random(4, 64, 64, 8, torch.bfloat16)
    assert afa.plan(problem.x, problem.lora_a, problem.lora_b, 0.5).backend != "cuda_emulated"


@pytest.mark.parametrize("misaligned", ["x", "y", "base", "z", ""])
def test_misaligned_memory_is_refused_and_no_crash(emulator, misaligned):
    """The module does nothing with operands that the kernels cannot read. z is its own to lay out."""

    def empty(rows, cols, name):
        start = int(name == misaligned)
        return torch.zeros(rows * cols + start).bfloat16()[start:].view(rows, cols)

    x, z, y, base = empty(9, 64, "x"), empty(9, 16, "z"), empty(9, 64, "y"), empty(9, 64, "base")
    member = (torch.randn(16, 64).bfloat16(), torch.randn(64, 16).bfloat16(), torch.tensor(0.5), 1, 1.0)
    workspace = torch.empty(emulator.forward_workspace((9, 64, 64, 16)), dtype=torch.uint8)
    emulator.use_torch(torch)

    def launched():
        return emulator.forward(x, [member], [(base, y, z)], None, 0, workspace, 0, 0)

    if misaligned == "z":
        with pytest.raises(ValueError, match="z: expected an address that is a multiple of 4"):
            launched()
    else:
        emulator.reset_counters()
        assert launched() == (not misaligned)
        assert (emulator.counters()["launches"] == 0) == bool(misaligned)
