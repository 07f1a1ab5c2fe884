"""A and B as callers hold them: the CUDA kernels round and pad them themselves, with no launch for it."""

import pytest
import torch
from conftest import skip_unless_available
from emulator_helpers import forward_and_backward, same
from helpers import Problem

from afa_kernels.backend import registry
from afa_kernels.options import Spec

NAMES = [name for name in ("cuda_emulated", "cuda_ptx") if name in registry.names()]
RANKS = (1, 5, 8, 12, 16, 17, 32, 33, 60, 64, 100, 128)
# (M, K, N): one pass, several tiles of K and N, edges of both; the split forward.
SHAPES = ((70, 456, 328), (40, 904, 136))


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available("cuda_emulated")


def count_launches(name: str, problem: Problem, **options) -> tuple[list[str], tuple]:
    """Return the kernels that a forward and a backward launch on the PTX machine, and their results."""
    from afa_kernels import _cuda_on_ptx

    _cuda_on_ptx.take_launches()
    results = forward_and_backward(problem, name=name, **options)
    kernels = [launch["kernel"].partition("_kernelI")[0] for launch in _cuda_on_ptx.take_launches()]
    return [kernel.removeprefix("_ZN3afa").lstrip("0123456789") for kernel in kernels], results


def held(weight: torch.Tensor, how: str) -> torch.Tensor:
    """Return a float32 weight that lies in memory in another way, between NaN that belong to nobody."""
    weight = weight.float()
    rows, cols = weight.shape
    around = torch.full((rows + 1, cols + 9), torch.nan)
    if how == "rows apart":  # rows of whole vectors
        around = torch.full((rows, (cols + 7) // 4 * 4), torch.nan)
        place = around[:, :cols]
    elif how == "misaligned":
        place = around[1:, 3 : 3 + cols]
    elif how == "transposed":
        place = torch.full((cols, rows + 5), torch.nan)[:, :rows].T
    else:
        assert how == "dense"
        return weight.clone()
    return place.copy_(weight)


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

    problem = Problem.random(140, 456, 328, 128, torch.bfloat16, adapter_dtype=torch.float32)
    roomy = forward_and_backward(problem)
    try:
        _emulator.set_device_limits(48, 99 << 10, 100 << 10)
        shared = {
            rounded: [k["shared_bytes"] for k in _emulator.launch_plan((140, 456, 328, 128), 48, 99 << 10, 100 << 10,
                                                                       rounded)][0]
            for rounded in (False, True)
        }  # fmt: skip
        assert shared[True] <= 99 << 10
        assert same(forward_and_backward(problem), roomy)
    finally:
        _emulator.set_device_limits(132, 227 << 10, 228 << 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    "r, m, expected",
    [
        (5, 70, ["project", "expand", "dy", "reduce", "x", "reduce"]),
        (16, 70, ["project", "expand", "dy", "reduce", "x", "reduce"]),
        (16, 6200, ["forward", "dy", "reduce", "x", "reduce"]),
        (64, 70, ["project", "expand", "project", "reduce", "db", "x", "reduce"]),
    ],
)
def test_what_a_call_launches(r, m, expected, dtype):
    """Nothing but the passes and their sums, whatever the dtype of A and B."""
    if "cuda_ptx" not in NAMES:
        pytest.skip("built with nvcc only")
    k, n = (904, 264) if m < 1000 else (16, 8)
    kernels, _ = count_launches("cuda_ptx", Problem.random(m, k, n, r, torch.bfloat16, adapter_dtype=dtype))
    assert kernels == expected


def test_floats_pass_through_shared_memory_without_bank_conflicts():
    from afa_kernels import _emulator

    for r in (16, 32, 64, 128):
        _emulator.reset_counters()
        problem = Problem.random(140, 456, 328, r, torch.bfloat16, adapter_dtype=torch.float32)
        forward_and_backward(problem, seed=torch.tensor(1), spec=Spec("relu", 1.0, 9))
        counters = _emulator.counters()
        assert counters["matrix_loads"] > 0 and counters["bank_conflicts"] == 0
