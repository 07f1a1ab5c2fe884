"""A and B as callers hold them: one launch rounds and pads them, unless the CUDA kernels can read them in place."""

import pytest
import torch
from conformance.layouts import placed
from conftest import skip_unless_available
from helpers import Problem
from ptx_cuda import NAME, forward_and_backward, kernel_names, launches_of, same

from afa_kernels.operator.activation import IDENTITY
from afa_kernels.operator.options import Spec

RANKS = (1, 5, 8, 12, 16, 17, 32, 33, 60, 64)
# (M, K, N): one pass, several tiles of K and N, edges of both; the split forward.
SHAPES = ((70, 456, 328), (40, 904, 136))


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available(NAME)


@pytest.mark.parametrize("how", ["packed", "rows apart", "rows at odd places", "columns apart"])
@pytest.mark.parametrize("r", RANKS)
def test_float32_weights_are_rounded(r, how):
    """To the bit as if the caller had rounded them; gradients come in float32."""
    for shape in SHAPES:
        plain = Problem.random(*shape, r, torch.bfloat16)
        weights = {name: placed(getattr(plain, name).float(), how) for name in ("lora_a", "lora_b")}
        expected = forward_and_backward(plain)
        got = forward_and_backward(Problem(**(vars(plain) | weights)))
        assert same(got[:3], expected[:3]), shape
        assert got[3].dtype == got[4].dtype == torch.float32
        assert same([t.bfloat16() for t in got[3:]], expected[3:]), shape


@pytest.mark.parametrize("which", ["lora_a", "lora_b"])
@pytest.mark.parametrize("r", [16, 40])
def test_one_weight_in_float32_beside_one_in_the_dtype_of_x(r, which):
    plain = Problem.random(70, 456, 328, r, torch.float16)
    mixed = Problem(**(vars(plain) | {which: getattr(plain, which).float()}))
    assert same(forward_and_backward(mixed)[:3], forward_and_backward(plain)[:3])


@pytest.mark.parametrize("activation", ["silu", IDENTITY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    "r, m, expected",
    [
        (5, 70, ["project", "expand", "dy", "reduce", "x", "reduce"]),
        (16, 6200, ["forward", "dy", "reduce", "x", "reduce"]),
        (17, 70, ["project", "expand", "dy", "reduce", "x", "reduce"]),
        (64, 70, ["project", "expand", "project_dy", "reduce", "db", "x", "reduce"]),
    ],
)
def test_what_a_call_launches(r, m, expected, dtype, activation):
    """A launch that packs A and B in each direction, unless they are 16-bit vectors; the same at identity."""
    k, n = (904, 264) if m < 1000 else (16, 8)
    problem = Problem.random(m, k, n, r, torch.bfloat16, adapter_dtype=dtype)
    kernels = kernel_names(launches_of(lambda: forward_and_backward(problem, spec=Spec(activation, 1.5))))
    packs = dtype == torch.float32 or r % 8 > 0
    passes = [name for name in kernels if name != "pack"]
    assert passes == expected
    first_of_backward = kernels.index("dy" if r <= 32 else "project_dy")
    assert kernels.count("pack") == (2 if packs else 0)
    assert not packs or kernels[0] == kernels[first_of_backward - 1] == "pack"
