"""The operator on every backend against float64, through autograd and with a frozen layer. What a backend itself has to
keep is in conformance/."""

import pytest
import torch
from conftest import SIMULATED, skip_unless_taken
from helpers import DTYPES, Problem, assert_matches, eager, mask_and_p, run

import afa_kernels as afa

pytestmark = pytest.mark.fast

LORA = ("x", "lora_a", "lora_b", "base")
LINEAR = ("x", "weight", "bias", "lora_a", "lora_b")

# (M, K, N, r): which path each one reaches
SHAPES = [
    (1, 64, 48, 8),  # decoding
    (5, 16, 24, 1),  # rank 1
    (37, 130, 51, 8),  # K and N off every vector and tile width, M prime
    (65, 72, 40, 16),  # one row past a tile of 64
    (16, 128, 136, 33),  # rank just past a power of two
    (33, 40, 264, 64),  # N beyond one column tile
    (33, 40, 584, 16),  # beyond one slab of dy
    (19, 264, 72, 128),  # the widest rank of the triton kernels
    (18, 48, 56, 256),  # the widest rank of all
    (203, 1, 1, 4),  # one feature in, one out
]
# Blocking over M, several chunks of the reductions: too slow where instructions are simulated.
LARGE_SHAPES = [(1031, 515, 259, 16), (4099, 64, 96, 8), (260, 1536, 1040, 64)]


def shape_id(shape):
    return "M{}-K{}-N{}-r{}".format(*shape)


def takes(backend, problem, **options):
    """Skip where the backend refuses the call, with its reason."""
    try:
        afa.plan(problem.x, problem.lora_a, problem.lora_b, 0.5, backend=backend, **options)
    except afa.BackendUnavailable as error:
        pytest.skip(str(error))


def assert_backend_matches(backend, problem, alpha_t, **options):
    takes(
        backend,
        problem,
        **{name: value for name, value in options.items() if name != "dropout_seed"},
    )
    plain = {name: options[name] for name in ("activation", "scaling") if name in options}
    plain |= mask_and_p(options.get("dropout_p", 0.0), options.get("dropout_seed", 0), problem.x)
    assert_matches(
        lambda **t: afa.afa_lora(**t, alpha_t=alpha_t, backend=backend, **options),
        lambda **t: eager(**t, alpha_t=alpha_t, **plain),
        problem,
        LORA,
        reorder="mask" not in plain,
    )
    assert_matches(
        lambda **t: afa.afa_linear(**t, alpha_t=alpha_t, backend=backend, **options),
        lambda **t: eager(**t, alpha_t=alpha_t, **plain),
        problem,
        LINEAR,
        reorder="mask" not in plain,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes(backend, device, poisoned_memory, shape, dtype):
    assert_backend_matches(backend, Problem.random(*shape, dtype, device), 0.3, scaling=1.7)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=shape_id)
def test_large_shapes(backend, device, poisoned_memory, shape, dtype):
    if backend in SIMULATED:
        pytest.skip(f"{backend}: simulated instructions are too slow for this shape")
    assert_backend_matches(backend, Problem.random(*shape, dtype, device), 0.6, scaling=0.5)


@pytest.mark.parametrize("alpha_t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", afa.activations())
def test_activations(backend, device, widest, activation, alpha_t):
    problem = Problem.random(23, 40, 24, 8, widest, device)
    problem.x *= 2  # far enough from 0 that every branch of an activation is reached
    assert_backend_matches(backend, problem, alpha_t, activation=activation)
    if alpha_t == 0.0:  # the number 0 leaves the activation out; a tensor of 0 does not
        tensor = torch.zeros((), device=device)
        assert_backend_matches(backend, problem, tensor, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(backend, device, poisoned_memory, dtype, p):
    problem = Problem.random(35, 88, 40, 8, dtype, device)
    assert_backend_matches(backend, problem, 0.4, dropout_p=p, dropout_seed=-7)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("r", [8, 48])
def test_identity(backend, device, poisoned_memory, dtype, r):
    problem = Problem.random(35, 88, 40, r, dtype, device)
    assert_backend_matches(backend, problem, 0.0, scaling=1.7)
    assert_backend_matches(backend, problem, 0.0, dropout_p=0.25, dropout_seed=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_float32_adapters_beside_16_bit_x(backend, device, dtype):
    """As PEFT keeps them: gradients come back in float32."""
    problem = Problem.random(70, 96, 64, 16, dtype, device, adapter_dtype=torch.float32)
    assert_backend_matches(backend, problem, 0.5)
    gradients = run(lambda **t: afa.afa_lora(**t, alpha_t=0.5, backend=backend), problem, LORA)
    assert gradients["dlora_a"].dtype == gradients["dlora_b"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_16_bit_adapters_beside_float32_x(backend, device, dtype):
    skip_unless_taken(backend, dtype)
    problem = Problem.random(21, 48, 40, 8, torch.float32, device, adapter_dtype=dtype)
    takes(backend, problem)
    got = run(lambda **t: afa.afa_lora(**t, alpha_t=0.5, backend=backend), problem, LORA)
    truth = run(lambda **t: eager(**t, alpha_t=0.5), problem, LORA, torch.float64)
    for what, value in got.items():
        bound = torch.finfo(dtype).eps / 2 if value.dtype == dtype else 1e-6
        assert (value.double() - truth[what]).norm() <= bound * truth[what].norm(), what


def test_gradient_of_a_sum_is_an_expanded_tensor(backend, device):
    problem = Problem.random(34, 48, 40, 8, torch.float32, device)
    takes(backend, problem)
    leaves, plain = problem.leaves(), problem.leaves(torch.float64)
    afa.afa_lora(**{n: leaves[n] for n in LORA}, alpha_t=0.5, backend=backend).sum().backward()
    eager(**{n: plain[n] for n in LORA}, alpha_t=0.5).sum().backward()
    for name in LORA:
        torch.testing.assert_close(leaves[name].grad.double(), plain[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", range(1, 16))
def test_every_subset_of_gradients(backend, device, widest, needed):
    problem = Problem.random(20, 32, 24, 8, widest, device)
    takes(backend, problem)
    want = run(lambda **t: afa.afa_lora(**t, alpha_t=0.5, backend=backend), problem, LORA)
    leaves = {n: getattr(problem, n).clone().requires_grad_(bool(needed >> i & 1)) for i, n in enumerate(LORA)}
    afa.afa_lora(**leaves, alpha_t=0.5, backend=backend).backward(problem.dy)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, want[f"d{name}"]), name
        else:
            assert leaf.grad is None
