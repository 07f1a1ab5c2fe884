"""Who adds up the partial results of dA and dB: a block that has the only one, whoever comes last in a slab, or the
reduce kernel. The bits are the same, and nobody adds up what is not needed."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from conftest import skip_unless_available
from cuda_groups import Group
from emulator_helpers import forward_and_backward, kernel_names, same
from helpers import Problem, assert_as_accurate_as_torch, eager, poisoned_memory

from afa_kernels.backend import registry

H100 = (132, 227 << 10, 228 << 10)
# M, K, N, r; the chunks of rows in the x and in the pass over dy, and those whose sums these write themselves.
LAYERS = {
    "one chunk": ((40, 136, 264, 5), (1, 1), (1, 1)),
    "two of dA": ((70, 712, 264, 16), (2, 1), (2, 1)),
    "dB by the reduce kernel, and so dA": ((200, 712, 264, 16), (4, 2), (0, 0)),
    "dB with dz": ((200, 712, 8200, 8), (4, 2), (4, 0)),
    "rank 32": ((300, 392, 264, 29), (3, 3), (3, 0)),
    "rank 32, more than elsewhere": ((1400, 136, 72, 32), (11, 11), (11, 0)),
    "more than the last block adds up": ((300, 712, 264, 16), (5, 3), (0, 0)),
    "rank 64, one chunk": ((100, 136, 264, 50), (1, 1), (1, 1)),
    "rank 64": ((200, 136, 264, 64), (2, 1), (2, 1)),
    "rank 64, dh by its segments": ((330, 136, 520, 64), (3, 2), (3, 2)),
    "rank 64, more than the last block adds up": ((3080, 24, 16, 64), (25, 13), (0, 0)),
}
GROUPS = {
    "q, k, v": (200, 136, (264, 72, 72), (16, 16, 16)),
    "odd": (330, 904, (136, 264, 8), (1, 17, 5)),
    "wide": (180, 456, (8, 392, 600), (32, 15, 16)),
}


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available("cuda_emulated")


@contextmanager
def limited(**limits):
    """Let the emulated device have other limits."""
    from afa_kernels import _emulator

    try:
        _emulator.set_device_limits(*H100, **limits)
        yield
    finally:
        _emulator.set_device_limits(*H100)


def planned(layer: tuple) -> dict[str, dict]:
    from afa_kernels import _emulator

    return {row["kernel"]: row for row in _emulator.launch_plan(layer, *H100)}


@pytest.mark.parametrize("which", LAYERS)
def test_what_the_passes_add_up_themselves(which):
    layer, chunks, sums = LAYERS[which]
    plan = planned(layer)
    x, dy = plan["x"], plan.get("dy")
    assert (x["grid"][1], dy["grid"][1] if dy else x["db_chunks"]) == chunks
    of_db = dy.get("sums", 0) if dy else min(x.get("sums", 0), x["db_chunks"])
    assert (x.get("sums", 0), of_db) == sums


@pytest.mark.parametrize(
    "layer, summed",
    [
        ((8192, 4096, 4096, 16), False),  # 12 chunks of 32 KB
        ((8192, 4096, 4096, 32), True),  # 6
        ((8192, 4096, 14336, 16), True),  # 11: the reduce kernel makes dz, and none is behind the x kernel
        ((8192, 14336, 4096, 32), True),  # 3
        ((8192, 4096, (4096, 1024, 1024), (16, 16, 16)), True),
        ((8192, 4096, (14336, 14336), (16, 16)), True),
        ((2048, 4096, 4096, 64), True),  # the reduce kernel makes dz before the x kernel, and none is behind it
        ((8192, 4096, 4096, 64), False),  # project_dy makes dz
        ((8192, 14336, 4096, 64), True),  # one chunk
    ],
    ids=str,
)
def test_the_last_block_adds_up_no_more_than_a_launch_is_worth(layer, summed):
    assert ("sums" in planned(layer)["x"]) == summed


def expected_launches(layer: tuple, need: tuple[bool, bool, bool]) -> list[str]:
    """Return the kernels of a backward that has z, by what is planned and what is needed."""
    plan, (need_dx, need_da, need_db) = planned(layer), need
    need_dz = need_dx or need_da
    da_left = need_da and "sums" not in plan["x"]
    db_left = need_db and "sums" not in plan.get("dy", plan["x"])
    if "dy" not in plan:
        first = ["project_dy"] if need_dz else ["reduce"]  # for h
        in_segments = plan["project_dy"]["grid"][1] > 1
        # Without project_dy nothing zeroes the counters of whoever comes last.
        db_left = db_left or (need_db and not need_dz and plan["x"]["db_chunks"] > 1)
        return first + ["reduce"] * (need_dz and in_segments) + ["x"] + ["reduce"] * (da_left or db_left)
    makes_dz = "dh_sums" in plan["x"]
    middle = not makes_dz and (need_dz or db_left)
    last = da_left or (makes_dz and db_left)
    return ["dy"] + ["reduce"] * middle + ["x"] * need_dz + ["reduce"] * last


@pytest.mark.parametrize("need", [n for n in itertools.product((True, False), repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("which", LAYERS)
def test_a_backward_launches_no_kernel_for_sums_that_the_passes_make(which, need):
    """And a gradient has the same bits whatever else is needed."""
    layer, _, _ = LAYERS[which]
    if "cuda_ptx" not in registry.names():
        pytest.skip("built with nvcc only")
    if layer[0] > 1000 and not all(need):
        pytest.skip("many rows, once")
    from afa_kernels import _cuda_on_ptx

    problem = Problem.random(*layer, torch.bfloat16, adapter_dtype=torch.float32)
    full = forward_and_backward(problem, name="cuda_ptx")
    _cuda_on_ptx.take_launches()
    with poisoned_memory():
        got = forward_and_backward(problem, name="cuda_ptx", need=need)
    launches = kernel_names(_cuda_on_ptx.take_launches())
    assert launches[-len(expected_launches(layer, need)) :] == expected_launches(layer, need)
    assert len([name for name in launches if name not in ("forward", "project", "expand")]) == len(
        [name for name in expected_launches(layer, need) if name != "project"]
    )
    for gradient, every, needed in zip(got[2:], full[2:], need, strict=True):
        assert (gradient is not None) == needed
        assert not needed or torch.equal(gradient, every)


def launches_of_emulator(call) -> tuple[int, object]:
    from afa_kernels import _emulator

    _emulator.reset_counters()
    result = call()
    return _emulator.counters()["launches"], result


@pytest.mark.parametrize("weights", [torch.float16, torch.float32], ids=["f16", "f32"])
@pytest.mark.parametrize("limits", [{}, {"round_limit": 128}, {"chunk_limit": 1, "round_limit": 128}], ids=str)
@pytest.mark.parametrize("which", LAYERS)
def test_the_bits_are_those_of_the_reduce_kernel(which, limits, weights):
    layer, _, sums = LAYERS[which]
    problem = Problem.random(*layer, torch.float16, adapter_dtype=weights)

    def call():
        with poisoned_memory():
            return forward_and_backward(problem)

    with limited(reduces_all=True, **limits):
        apart, expected = launches_of_emulator(call)
    with limited(**limits):
        launches, got = launches_of_emulator(call)
    assert same(got, expected)
    if not limits:
        forward = sum(name in planned(layer) for name in ("forward", "project", "expand"))
        assert launches == forward + len(expected_launches(layer, (True, True, True))) <= apart


@pytest.mark.parametrize("float_weights", [None, False], ids=["mixed", "x's dtype"])
@pytest.mark.parametrize("limits", [{}, {"round_limit": 128}, {"chunk_limit": 1, "round_limit": 128}], ids=str)
@pytest.mark.parametrize("which", GROUPS)
def test_the_bits_of_a_group_are_those_of_the_reduce_kernel(which, limits, float_weights):
    group = Group(*GROUPS[which], float_weights=float_weights)
    _, zs = group.forward()

    def call():
        with poisoned_memory():
            dx, das, dbs = group.backward(zs, need_da=[True, False, True], need_db=[False, True, True])
        return [dx, *das, *dbs]

    with limited(reduces_all=True, **limits):
        apart, expected = launches_of_emulator(call)
    with limited(**limits):
        launches, got = launches_of_emulator(call)
    assert same(got, expected)
    assert launches == apart - 1


@pytest.mark.parametrize("seed", range(4))
def test_whoever_comes_last_makes_the_same_bits(seed):
    from afa_kernels import _emulator

    problem = Problem.random(*LAYERS["dB with dz"][0], torch.bfloat16)
    expected = forward_and_backward(problem)
    try:
        _emulator.set_options(("random", "warp_priority", "ascending", "descending")[seed], seed)
        assert same(forward_and_backward(problem), expected)
    finally:
        _emulator.set_options("random", 1)


def gradients(problem: Problem, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return dA and dB in torch ops."""
    weights = [w.to(problem.x.dtype).to(dtype).requires_grad_() for w in (problem.lora_a, problem.lora_b)]
    y = eager(problem.x.to(dtype), *weights, 0.3, scaling=1.5, base=problem.base.to(dtype))
    y.backward(problem.dy.to(dtype))
    return [w.grad for w in weights]


@pytest.mark.parametrize("name", [name for name in ("cuda_emulated", "cuda_ptx") if name in registry.names()])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("which", LAYERS)
def test_gradients_against_float64(name, which, weights):
    layer, _, _ = LAYERS[which]
    problem = Problem.random(*layer, torch.bfloat16, adapter_dtype=weights)
    with poisoned_memory():
        _, _, _, da, db = forward_and_backward(problem, name=name)
    truth, torch_ops = (gradients(problem, dtype) for dtype in (torch.float64, torch.bfloat16))
    for what, got, exact, yardstick in zip(("da", "db"), (da, db), truth, torch_ops, strict=True):
        assert got.dtype == weights
        assert_as_accurate_as_torch(got.to(yardstick.dtype), yardstick, exact, what, torch.bfloat16)
