"""Tall tiles of rows, with which the forward and the project_dy kernel read A and B half as often: where they are
taken, and that no bit depends on them."""

from contextlib import contextmanager

import pytest
import torch
from conftest import skip_unless_available
from cuda_bytes import moved
from cuda_groups import Group
from emulator_helpers import forward_and_backward, kernel_names, same
from helpers import Problem, poisoned_memory
from native_helpers import assert_accurate, problem, run, truth_of

from afa_kernels.backend import registry, torch_ops
from afa_kernels.backend.registry import Spec
from bench.model.cuda_launches import H100 as modelled_gpu
from bench.model.cuda_launches import Layer, kernels

A100, H100, B200 = (108, 163 << 10, 164 << 10), (132, 227 << 10, 228 << 10), (148, 227 << 10, 228 << 10)
NAMES = [name for name in ("cuda_emulated", "cuda_ptx") if name in registry.names()]
# M, K, N: full tiles and others, and a last tile of a few rows.
SHAPES = [(256, 200, 136), (131, 72, 120), (70, 136, 88)]


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available("cuda_emulated")


def planned(layer: tuple, device: tuple = H100) -> dict[str, dict]:
    from afa_kernels import _emulator

    return {row["kernel"]: row for row in _emulator.launch_plan(layer, *device, rounded=True)}


@contextmanager
def multiprocessors(count: int, name: str):
    """Let the simulated device have many multiprocessors, or the two that two tall tiles fill."""
    if name == "cuda_ptx":
        import ptx_cuda

        with ptx_cuda.kernels.on((ptx_cuda.SMALL_DEVICES if count == 2 else ptx_cuda.DEVICES)["sm_80"]):
            yield
        return
    from afa_kernels import _emulator

    try:
        _emulator.set_device_limits(count, *H100[1:])
        yield
    finally:
        _emulator.set_device_limits(*H100)


@pytest.mark.parametrize("device", [A100, H100, B200], ids=["A100", "H100", "B200"])
@pytest.mark.parametrize("r", [16, 32, 64, 128])
def test_tiles_are_tall_where_there_are_enough_of_them(r, device):
    for m in (1000, 4096, 6000, 8192, 16384, 131072):
        plan = planned((m, 4096, 4096, r), device)
        for name in ("forward", "project_dy"):
            if name not in plan:
                continue
            kernel = plan[name]
            enough = m / 128 >= 0.48 * device[0] and kernel["grid"][1] == 1
            assert kernel["threads"] == 256 if r == 128 else kernel["threads"] in (128, 256), (m, name)
            assert kernel["threads"] == 128 or r == 128 or (enough and r > 16), (m, name)
            assert kernel["grid"][0] == -(-m // kernel["launches"] // (kernel["threads"] // 2)), (m, name)
        if r == 64 and m == 8192:
            assert plan["forward"]["threads"] == (256 if device != B200 else 128)


def test_a_short_last_wave_or_few_bytes_are_reasons_against_them():
    assert planned((8192, 4096, 4096, 32))["forward"]["threads"] == 256
    from afa_kernels import _emulator

    forward, *_ = _emulator.launch_plan((8192, 4096, 4096, 32), *H100, rounded=False)
    assert forward["threads"] == 128, "with A and B in 16 bits reads of x take longer"
    # 142 tall tiles, 1.08 waves of one to a multiprocessor, or 284 tiles, of which all have a place.
    assert planned((142 * 128, 4096, 4096, 32))["forward"]["threads"] == 128


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("threshold", [0, 60], ids=["", "dropout"])
@pytest.mark.parametrize("r", [17, 32, 50, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_the_other_tiles(name, shape, r, threshold, weights):
    p = Problem.random(*shape, r, torch.bfloat16, adapter_dtype=weights)
    given = {"seed": torch.tensor(3), "spec": Spec("silu", 1.5, threshold), "name": name, "save_z": not threshold}
    with multiprocessors(132, name), poisoned_memory():
        expected = forward_and_backward(p, **given)
    if name == "cuda_ptx":
        from afa_kernels import _cuda_on_ptx

        _cuda_on_ptx.take_launches()
    with multiprocessors(2, name), poisoned_memory():
        got = forward_and_backward(p, **given)
    assert same(got, expected)
    if name == "cuda_ptx":
        tall = {kernel_names([launch])[0] for launch in _cuda_on_ptx.take_launches() if "Lb1E" in launch["kernel"]}
        rounded = weights == torch.float32 or r % 8 > 0
        assert tall == ({"forward"} if r > 32 or rounded else set()) | ({"project_dy"} if r > 32 else set())


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_share_x(name):
    """Their ranks together make the class of the tile."""
    layer = (240, 136, (72, 40), (16, 32))
    group = Group(*layer, float_weights=True)
    assert planned(layer, (2, *A100[1:]))["forward"]["tile_rows"] == 128
    with multiprocessors(132, name):
        expected = group.forward(name)
    with multiprocessors(2, name):
        got = group.forward(name)
    for some, others in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", NAMES)
def test_they_move_the_bytes_of_the_model(name, weights):
    p = Problem.random(256, 256, 136, 64, torch.bfloat16, adapter_dtype=weights)
    shared = A100 if name == "cuda_ptx" else H100
    gpu = modelled_gpu._replace(multiprocessors=2, shared_per_block=shared[1], shared_per_multiprocessor=shared[2])
    both = kernels(Layer(256, 256, 136, 64), gpu, float_weights=weights == torch.float32)
    assert [kernel.grid for direction in both for kernel in direction][:2] == [(2, 1)] * 2, "tiles of 128 rows"
    with multiprocessors(2, name):
        got = moved(name, lambda name: forward_and_backward(p, name=name))
    expected = sum(kernel.hbm + kernel.l2 for direction in both for kernel in direction)
    assert got == pytest.approx(expected + p.base.nbytes, rel=0.03)


@pytest.mark.parametrize("r", [30, 64])
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(name, r):
    operands, spec = problem(250, 200, 120, r, torch.bfloat16, ab_dtype=torch.float32), Spec("silu", 1.5)
    with multiprocessors(2, name):
        got = run(*operands, spec, backend=registry.get(name))
    assert_accurate(got, run(*operands, spec, backend=torch_ops), truth_of(*operands, spec), torch.bfloat16)
