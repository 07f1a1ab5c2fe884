"""The Triton backend on a real GPU: streams, several devices, CUDA graphs, autocast, compilations.

Without one they skip with the registry's reason; ``AFA_KERNELS_REQUIRE=triton`` makes that a
failure. The numerics of every shape and dtype are test_numerics.py's, which runs there too.
"""

import pytest
import torch
from conftest import REQUIRED, SIMULATED
from helpers import Problem, assert_matches, eager

import afa_kernels as afa

LORA = ("x", "lora_a", "lora_b", "base")
LINEAR = ("x", "weight", "bias", "lora_a", "lora_b")


@pytest.fixture(autouse=True)
def _gpu():
    status = afa.backends()["triton"]
    if status.available and "triton" not in SIMULATED and torch.cuda.is_available():
        return
    reason = status.reason or "no GPU: TRITON_INTERPRET=1 runs the kernels on the CPU"
    if "triton" in REQUIRED:
        pytest.fail(f"AFA_KERNELS_REQUIRE names a backend that cannot run: triton: {reason}")
    pytest.skip(f"triton: {reason}")


def problem(dtype=torch.bfloat16, device="cuda", shape=(513, 1024, 768, 16)) -> Problem:
    return Problem.random(*shape, dtype, device)


def linear(p: Problem, alpha_t, **options):
    return afa.afa_linear(p.x, p.weight, p.bias, p.lora_a, p.lora_b, alpha_t, backend="triton", **options)


@pytest.mark.parametrize(
    "shape",
    [
        (8192, 4096, 4096, 16),
        (4096, 4096, 1024, 32),
        (8192, 1024, 4096, 64),
        (16384, 2048, 512, 128),
    ],
    ids=str,
)
def test_layers_of_real_size(shape):
    p = problem(shape=shape)
    assert_matches(
        lambda **t: afa.afa_linear(**t, alpha_t=0.3, backend="triton"),
        lambda **t: eager(**t, alpha_t=0.3),
        p,
        LINEAR,
    )


def test_is_chosen_before_torch():
    p = problem()
    chosen = afa.plan(p.x, p.lora_a, p.lora_b, 0.5).backend
    assert chosen in ("cuda", "triton")
    assert afa.plan(p.x, p.lora_a, p.lora_b, 0.5, backend="triton").backend == "triton"
    wide = problem(shape=(64, 512, 512, 256))
    with pytest.raises(afa.BackendUnavailable, match="rank 256"):
        afa.plan(wide.x, wide.lora_a, wide.lora_b, 0.5, backend="triton")


def test_runs_on_the_current_stream():
    p, alpha_t = problem(), torch.tensor(0.5, device="cuda")
    want = linear(p, alpha_t)
    stream = torch.cuda.Stream()
    p.x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # A long wait ahead of the copy: work on another stream would see zeros.
        torch.cuda._sleep(100_000_000)
        p.x.copy_(problem().x)
        first = p.x.clone()
        got = linear(p, alpha_t)
    stream.synchronize()
    p.x.copy_(first)
    assert torch.equal(got, linear(p, alpha_t))
    assert not torch.equal(got, want)


def test_runs_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    want = linear(problem(device="cuda:0"), 0.5)
    with torch.cuda.device(0):
        p = problem(device="cuda:1")
        got = linear(p, 0.5)
    assert got.device == torch.device("cuda:1") and got.shape == want.shape
    plain = eager(p.x, p.lora_a, p.lora_b, 0.5, weight=p.weight, bias=p.bias)
    torch.testing.assert_close(got, plain, rtol=2e-2, atol=2e-2)


def test_a_captured_graph_follows_alpha_and_seed():
    p = problem()
    alpha_t = torch.tensor(1.0, device="cuda")
    seed = torch.tensor(1, device="cuda")
    leaves = {n: getattr(p, n).clone().requires_grad_() for n in ("x", "lora_a", "lora_b")}

    def step():
        y = afa.afa_linear(
            weight=p.weight, bias=p.bias, **leaves, alpha_t=alpha_t, dropout_p=0.25,
            dropout_seed=seed, backend="triton",
        )  # fmt: skip
        return y, torch.autograd.grad(y, list(leaves.values()), p.dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = step()
    seen = []
    for value, seed_value in ((0.8, 2), (0.4, 2), (0.4, 3)):
        alpha_t.fill_(value)
        seed.fill_(seed_value)
        graph.replay()
        want_y, want_gradients = step()
        assert torch.equal(y, want_y)
        for got, want in zip(gradients, want_gradients, strict=True):
            assert torch.equal(got, want)
        seen.append(y.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_autocast_with_float32_adapters():
    p = Problem.random(257, 512, 384, 16, torch.float32, "cuda")
    leaves = {n: getattr(p, n).clone().requires_grad_() for n in LORA}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = afa.afa_lora(**leaves, alpha_t=0.5, backend="triton")
    y.backward(p.dy.to(y.dtype))
    for leaf in leaves.values():
        assert leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all()


def test_a_moving_alpha_compiles_nothing():
    from afa_kernels.backend.triton import forward_kernels

    p, alpha_t = problem(), torch.tensor(1.0, device="cuda")

    def compiled() -> int:
        function = forward_kernels.xa_phi_hb_forward_kernel
        caches = getattr(function, "device_caches", None)
        if caches is None:
            return sum(len(cache) for cache in function.cache.values())
        return sum(len(cache[0]) for cache in caches.values())

    linear(p, alpha_t)
    before = compiled()
    for step in range(100):
        alpha_t.fill_(1 - step / 100)
        linear(p, alpha_t)
        linear(p, 1 - step / 101)
    assert compiled() == before


def test_two_runs_agree_to_the_bit():
    p = problem(shape=(3000, 1536, 1040, 16))
    assert torch.equal(linear(p, 0.5, dropout_p=0.1, dropout_seed=3), linear(p, 0.5, dropout_p=0.1, dropout_seed=3))
