"""A and B as callers hold them: the CUDA kernels round and pad them themselves, with no launch for it."""

import pytest
import torch
from conftest import skip_unless_available
from emulator_helpers import forward_and_backward, held, kernel_names, same
from helpers import Problem

from afa_kernels.activation import IDENTITY
from afa_kernels.backend import registry
from afa_kernels.options import Spec

NAMES = [name for name in ("cuda_emulated", "cuda_ptx") if name in registry.names()]
RANKS = (1, 5, 8, 12, 16, 17, 32, 33, 60, 64)
# (M, K, N): one pass, several tiles of K and N, edges of both; the split forward.
SHAPES = ((70, 456, 328), (40, 904, 136))


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available("cuda_emulated")


def launched(name: str, problem: Problem, **options) -> list[str]:
    """Return the kernels that a forward and a backward launch on the PTX machine."""
    from afa_kernels import _cuda_on_ptx

    _cuda_on_ptx.take_launches()
    forward_and_backward(problem, name=name, **options)
    return kernel_names(_cuda_on_ptx.take_launches())


@pytest.mark.parametrize("how", ["dense", "rows apart", "misaligned", "transposed"])
@pytest.mark.parametrize("r", RANKS)
def test_float32_weights_are_rounded_as_they_are_read(r, how):
    """To the bit as if the caller had rounded them; gradients come in float32."""
    for shape in SHAPES:
        plain = Problem.random(*shape, r, torch.bfloat16)
        weights = {name: held(getattr(plain, name), how) for name in ("lora_a", "lora_b")}
        for save_z in (True, False):
            expected = forward_and_backward(plain, save_z=save_z)
            got = forward_and_backward(Problem(**(vars(plain) | weights)), save_z=save_z)
            assert same(got[:3], expected[:3]), shape
            assert got[3].dtype == got[4].dtype == torch.float32
            assert same([t.bfloat16() for t in got[3:]], expected[3:]), shape


@pytest.mark.parametrize("which", ["lora_a", "lora_b"])
@pytest.mark.parametrize("r", [16, 40])
def test_one_weight_in_float32_beside_one_in_the_dtype_of_x(r, which):
    plain = Problem.random(70, 456, 328, r, torch.float16)
    mixed = Problem(**(vars(plain) | {which: getattr(plain, which).float()}))
    assert same(forward_and_backward(mixed)[:3], forward_and_backward(plain)[:3])


def test_float32_weights_need_no_room_in_shared_memory():
    """Where the ring of floats does not fit, elements are read one by one: the same bits."""
    from afa_kernels import _emulator

    problem = Problem.random(140, 456, 328, 64, torch.bfloat16, adapter_dtype=torch.float32)
    roomy = forward_and_backward(problem)
    try:
        _emulator.set_device_limits(48, 99 << 10, 100 << 10)
        shared = {
            rounded: [k["shared_bytes"] for k in _emulator.launch_plan((140, 456, 328, 64), 48, 99 << 10, 100 << 10,
                                                                       rounded)][0]
            for rounded in (False, True)
        }  # fmt: skip
        assert shared[True] <= 99 << 10
        assert same(forward_and_backward(problem), roomy)
    finally:
        _emulator.set_device_limits(132, 227 << 10, 228 << 10)


@pytest.mark.parametrize("activation", ["silu", IDENTITY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    "r, m, expected",
    [
        (5, 70, ["project", "expand", "dy", "x"]),
        (16, 70, ["project", "expand", "dy", "x"]),
        (16, 6200, ["forward", "dy", "x", "reduce"]),
        (17, 70, ["project", "expand", "dy", "reduce", "x"]),
        (64, 70, ["project", "expand", "project_dy", "reduce", "x"]),
    ],
)
def test_what_a_call_launches(r, m, expected, dtype, activation):
    """Nothing but the passes and their sums, whatever the dtype of A and B, and the same at identity."""
    if "cuda_ptx" not in NAMES:
        pytest.skip("built with nvcc only")
    k, n = (904, 264) if m < 1000 else (16, 8)
    problem = Problem.random(m, k, n, r, torch.bfloat16, adapter_dtype=dtype)
    kernels = launched("cuda_ptx", problem, spec=Spec(activation, 1.5))
    assert kernels == expected


def test_floats_pass_through_shared_memory_without_bank_conflicts():
    from afa_kernels import _emulator

    for r in (16, 32, 64):
        _emulator.reset_counters()
        problem = Problem.random(140, 456, 328, r, torch.bfloat16, adapter_dtype=torch.float32)
        forward_and_backward(problem, seed=torch.tensor(1), spec=Spec("relu", 1.0, 9))
        counters = _emulator.counters()
        assert counters["matrix_loads"] > 0 and counters["bank_conflicts"] == 0
