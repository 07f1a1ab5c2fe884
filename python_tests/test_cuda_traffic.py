"""bench/model/cuda_launches.py: the bytes of its formulas are those that the compiled kernels move on the PTX machine,
and, where there is no nvcc, those that their source moves on the emulator."""

import pytest
import torch
from conftest import skip_unless_available
from emulator_helpers import forward_and_backward
from helpers import Problem

from afa_kernels.backend import registry
from bench.model import __main__ as command
from bench.model.cuda_launches import H100, Layer, kernels, overhead

_BYTES = ("global_read_bytes", "global_write_bytes", "async_copy_bytes")


def moved(name: str, problem: Problem) -> int:
    """Return the bytes between global memory and the blocks, in a forward and a backward."""
    if name == "cuda_ptx":
        from afa_kernels import _cuda_on_ptx

        _cuda_on_ptx.take_launches()
        forward_and_backward(problem, name=name)
        launches = _cuda_on_ptx.take_launches()
    else:
        from afa_kernels import _emulator

        _emulator.reset_counters()
        forward_and_backward(problem, name=name)
        launches = [_emulator.counters()]
    return sum(launch[counter] for launch in launches for counter in _BYTES)


@pytest.fixture(autouse=True)
def _planned():
    """Without CUDA kernels in the build, the emulator plans the launches."""
    skip_unless_available("cuda_emulated")


@pytest.mark.parametrize("name", [name for name in ("cuda_ptx", "cuda_emulated") if name in registry.names()])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    "shape",
    [
        (192, 256, 256, 16),
        (200, 712, 264, 16),
        (256, 512, 640, 32),
        (192, 264, 1032, 64),
        (256, 520, 512, 128),
        (200, 136, 88, 8),
    ],
    ids=str,
)
def test_bytes_of_a_call(name, shape, weights):
    skip_unless_available(name)
    problem = Problem.random(*shape, torch.bfloat16, adapter_dtype=weights)
    layer = Layer(*shape)
    modelled = sum(
        kernel.hbm + kernel.l2
        for direction in kernels(layer, float_weights=weights == torch.float32)
        for kernel in direction
    )
    base = 2 * shape[0] * shape[2]  # read here; in a layer the frozen GEMM accumulates instead
    assert moved(name, problem) == pytest.approx(modelled + base, rel=0.03)


def test_a_kernel_with_little_under_way_or_a_short_last_wave_takes_longer():
    forward = kernels(Layer(8192, 4096, 4096, 16))[0][-1]
    seconds, bound = forward.seconds(H100, "bad")
    assert bound == "memory"
    slow, bound = forward._replace(under_way=2048).seconds(H100, "bad")
    assert slow > 2 * seconds and bound == "latency"
    late, bound = forward._replace(waves=1.1).seconds(H100, "bad")
    assert late > 1.5 * seconds and bound == "tail"


def test_float32_weights_cost_bytes_from_the_l2_cache_and_no_launches():
    layer = Layer(8192, 4096, 4096, 16)
    both = [[kernel for way in kernels(layer, float_weights=f) for kernel in way] for f in (True, False)]
    assert [kernel.name for kernel in both[0]] == [kernel.name for kernel in both[1]]
    assert sum(kernel.l2 for kernel in both[0]) > sum(kernel.l2 for kernel in both[1])
    assert overhead(layer).both.bad < 30


def test_the_command_prints_every_kernel_and_the_check_its_figures(capsys):
    assert command.main(["--m", "1024", "--r", "16", "64"]) == 0
    shown = capsys.readouterr().out
    assert "MODELLED" in shown and all(
        name in shown for name in ("project", "expand", "dy", "db", "x", "reduce")
    )
    status = command.main(["--check"])
    figures = [line for line in capsys.readouterr().out.splitlines() if "at most" in line]
    assert len(figures) == 6 and all(line.startswith(("ok ", "MISSED ")) for line in figures)
    assert status == any(line.startswith("MISSED") for line in figures)
