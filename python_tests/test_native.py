"""How accurate the native CPU kernels are, against float64 and the torch backend."""

import random

import pytest
import torch
import torch.nn.functional as F
from native_helpers import DTYPES, accuracy_of_every_shape, assert_accurate, check, problem, run, truth_of

from afa_kernels import afa_lora
from afa_kernels.backend import cpu
from afa_kernels.operator import ops
from afa_kernels.operator.activation import ACTIVATIONS, phi
from afa_kernels.operator.options import Options, Spec

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not cpu.BACKEND.status(), reason=cpu.BACKEND.status().reason),
]


def test_accuracy():
    accuracy_of_every_shape()


@pytest.mark.parametrize("dropout", [0, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_frozen_gemm_plus_the_branch(dtype, dropout):
    x, a, b, dy, _ = problem(60, 70, 50, 6, dtype, ab_dtype=torch.float32)
    weight = (torch.randn(50, 70) / 8).to(dtype)
    bias = torch.randn(50)
    spec, alpha_t, seed = Spec("silu", 1.5, dropout), torch.tensor(0.4), torch.tensor(8)
    frozen = F.linear(x.double(), weight.double(), bias.to(dtype).double())
    truth = truth_of(x, a, b, dy, frozen, spec, alpha_t=0.4, seed=seed)
    truth = (truth[0], truth[1], truth[2] + dy.double() @ weight.double(), *truth[3:])
    results = []
    for backend in ("cpu", "torch"):
        options = Options(spec, True, backend)
        y, z = ops.linear_forward(True, weight, bias, x, a, b, alpha_t, seed, options, None)
        gradients = ops.linear_backward(True, weight, dy, x, a, b, z, alpha_t, seed, options, None, True, True)
        results.append((y, z, *gradients))
    assert_accurate(*results, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_go_where_the_sums_go_and_nowhere_else(dtype):
    """No zero of a padding may meet them: infinity times 0 is NaN."""
    x, dy, base = torch.randn(200, 100), torch.randn(200, 70), torch.randn(200, 70)
    x[3, 7], x[150, 2], base[9, 3], dy[20, 4] = float("inf"), float("nan"), float("inf"), float("inf")
    leaves = [
        x.to(dtype).requires_grad_(),
        torch.randn(5, 100, requires_grad=True),
        torch.randn(70, 5, requires_grad=True),
    ]
    found = []
    for backend in ("cpu", "reference"):
        y = afa_lora(*leaves, 0.5, base=base.to(dtype), backend=backend)
        found.append([torch.isfinite(t) for t in (y, *torch.autograd.grad(y, leaves, dy.to(dtype)))])
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    assert not found[0][0].all() and found[0][0].sum() > 197 * 69


def test_gradients_of_float32_factors_are_not_rounded_to_the_dtype_of_x():
    x, a, b, dy, base = problem(300, 64, 64, 8, torch.bfloat16, ab_dtype=torch.float32)
    da, db = run(x, a, b, dy, base, Spec("silu", 1.0))[3:]
    assert da.dtype == db.dtype == torch.float32
    assert not torch.equal(da, da.bfloat16().float()) and not torch.equal(db, db.bfloat16().float())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_values_are_the_python_ones(activation):
    # K = 1 and N = 1 with factors 1 make the operator phi itself, and dx its slope.
    z = torch.cat((torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4])))
    one, alpha_t = torch.ones(1, 1), torch.tensor(1.0)
    x = z[:, None].contiguous()
    y = torch.empty_like(x)
    spec = Spec(activation, 1.0)
    z = cpu.BACKEND.forward(x, one, one, alpha_t, None, spec, base=None, out=y, save_z=True)
    dx, _, _ = cpu.BACKEND.backward(
        torch.ones_like(x), x, one, one, z, alpha_t, None, spec, need_dx=True, need_da=False, need_db=False
    )
    exact = x.double()
    torch.testing.assert_close(y.double(), phi(exact, 1.0, activation), rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(dx.double(), ACTIVATIONS[activation].slope(exact), rtol=2e-6, atol=3e-6)


def test_random_problems():
    draw = random.Random(5)
    for case in range(16):
        m, k, n = (draw.randint(1, high) for high in (100, 300, 300))
        dtype = draw.choice(DTYPES)
        operands = problem(m + 8, k + 16, n + 16, draw.randint(2, 40), dtype, seed=case)
        threshold = draw.choice((0, 0, 64))
        seed = torch.tensor(case) if threshold else None
        spec = Spec(draw.choice(list(ACTIVATIONS)), 1.5, threshold)
        check(operands, spec, seed=seed, alpha_t=draw.choice((0.0, 0.3, 1.0)))
