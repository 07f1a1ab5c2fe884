"""bench/model/cuda_launches.py: the bytes of its formulas are those that the kernels move on the PTX machine."""

import json

import pytest
import torch
from conformance.problems import Problem
from conftest import skip_unless_available
from ptx_cuda import NAME, bytes_moved, launches_of
from ptx_cuda import kernels as on_ptx

from bench.model import __main__ as command
from bench.model import mlp
from bench.model.cuda_launches import H100, Layer, Range, decoding, kernels, overhead


def modelled(layer: Layer, weights: torch.dtype) -> int:
    both = kernels(layer, float_weights=weights == torch.float32)
    return sum(kernel.hbm + kernel.l2 for direction in both for kernel in direction)


@pytest.fixture(autouse=True)
def _planned():
    """The kernels' own host code plans the launches."""
    skip_unless_available(NAME)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    "shape",
    [
        (192, 256, 256, 16),
        (200, 712, 584, 16),
        (256, 512, 640, 32),
        (192, 264, 1032, 64),
        (256, 520, 512, 60),
        (200, 136, 88, 8),
        (64, 712, 264, 16),  # one chunk of x and of dy
        (70, 712, 264, 16),  # two of x
        (120, 520, 512, 64),  # one of x
    ],
    ids=str,
)
def test_bytes_of_a_call(shape, weights):
    problem = Problem.of(torch.bfloat16, *shape, weights=weights)
    base = 2 * shape[0] * shape[2]  # read here; in a layer the frozen GEMM accumulates instead
    got = bytes_moved(launches_of(lambda: problem.run(on_ptx)))
    assert got == pytest.approx(modelled(Layer(*shape), weights) + base, rel=0.03)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    "layer",
    [
        Layer(192, 512, (512, 256, 256), (16, 16, 16)),
        Layer(200, 712, (264, 520), (8, 16)),
        Layer(256, 136, (640, 256, 512), (32, 16, 16)),
    ],
    ids=str,
)
def test_bytes_of_layers_that_share_x(layer, weights):
    problem = Problem.of(torch.bfloat16, *layer, weights=weights, base="none")
    got = bytes_moved(launches_of(lambda: problem.run(on_ptx)))
    assert got == pytest.approx(modelled(layer, weights), rel=0.03)


def test_a_kernel_with_little_under_way_or_a_short_last_wave_takes_longer():
    forward = kernels(Layer(8192, 4096, 4096, 16))[0][-1]
    seconds, bound = forward.seconds(H100, "bad")
    assert bound == "memory"
    slow, bound = forward._replace(under_way=2048).seconds(H100, "bad")
    assert slow > 2 * seconds and bound == "latency"
    late, bound = forward._replace(busy=0.55).seconds(H100, "bad")
    assert late > 1.5 * seconds and bound == "tail"


def test_instructions_bound_a_kernel_where_a_report_says_so(tmp_path, capsys):
    report = tmp_path / "report.json"
    rows = [{"arch": "90", "kernel": "dy", "rank": 16, "rate": rate} for rate in (2e12, 1e12)]
    rows += [
        {"arch": "80", "kernel": "dy", "rank": 16, "rate": 1.0},
        {"arch": "90", "kernel": "pack", "rank": 0, "rate": 0},
    ]
    report.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpu = H100._replace(allowed=command.allowed(report))
    dy = next(kernel for kernel in kernels(Layer(8192, 4096, 4096, 16), gpu)[1] if kernel.name == "dy")
    seconds, bound = dy.seconds(gpu, "bad")
    assert bound == "instructions" and seconds >= dy.hbm / 1e12 > dy.seconds(H100, "bad")[0]
    assert command.main(["--m", "8192", "--r", "16", "--instructions", str(report)]) == 0
    assert "instructions" in capsys.readouterr().out


def test_float32_weights_cost_a_small_launch_in_each_direction():
    layer = Layer(8192, 4096, 4096, 16)
    rounded, plain = (kernels(layer, float_weights=f) for f in (True, False))
    for way, other in zip(rounded, plain, strict=True):
        assert [kernel.name for kernel in way] == ["pack", *(kernel.name for kernel in other)]
    assert overhead(layer).both.bad < 30


def test_the_command_prints_every_kernel(capsys):
    assert command.main(["--m", "1024", "--r", "16", "64"]) == 0
    shown = capsys.readouterr().out
    assert "MODELLED" in shown and all(
        name in shown for name in ("pack", "project", "expand", "dy", "project_dy", "db", "x", "reduce")
    )


def test_an_mlp_block_reads_and_writes_what_it_does_not_keep(capsys):
    """act(gate), of gate, and h, of act(gate) and up: five tensors of the wide size more than its layers."""
    assert [mlp.passes(way) for way in mlp.WAYS] == [(3, 14), (0, 14), (0, 19)]
    assert command.main(["--mlp", "--r", "16"]) == 0
    shown = capsys.readouterr().out
    assert "MODELLED" in shown and all(shown.count(way) == len(mlp.BLOCKS) for way in mlp.WAYS)


def test_layers_that_share_x_cost_less_than_one_by_one():
    together = sum(overhead(Layer(8192, 4096, (4096, 1024, 1024), (16, 16, 16))).both)
    alone = [overhead(Layer(8192, 4096, n, 16)).both for n in (4096, 1024, 1024)]
    flops = [4096, 1024, 1024]
    apart = sum(sum(each) * share for each, share in zip(alone, flops, strict=True)) / sum(flops)
    assert together < 0.75 * apart


def test_one_token_waits_for_memory_and_not_for_bytes():
    project, expand = kernels(Layer(1, 4096, 4096, 16), float_weights=False)[0]
    for kernel in (project, expand):
        assert kernel.seconds(H100, "good")[0] >= (kernel.gaps(H100, "good") + H100.latency.good) * 0.999
        assert kernel.waits == 1
    assert project.gaps(H100, "bad") == H100.launch.bad > expand.gaps(H100, "bad")
    assert decoding(Layer(1, 4096, 4096, 16)).good > 0


def test_a_launch_behind_a_kernel_of_ours_costs_less_but_the_kernel_still_waits_for_what_it_reads():
    dy, *others = kernels(Layer(8192, 4096, 4096, 16), float_weights=False)[1]
    assert dy.gaps(H100, "good") == H100.launch.good and dy.gaps(H100, "bad") == H100.launch.bad
    for kernel in others:
        assert kernel.gaps(H100, "bad") == pytest.approx(H100.launch.bad - H100.hidden.bad)
        assert kernel.gaps(H100, "good") == H100.latency.good, "more would be hidden than there is to wait for"
    rounds = kernels(Layer(131072, 4096, 4096, 16), float_weights=False)[1]
    assert rounds[0].launches > 1 and rounds[0].behind == rounds[0].launches - 1
    nothing = H100._replace(hidden=Range(0.0, 0.0))
    assert overhead(Layer(8192, 4096, 4096, 16), nothing).both.bad > overhead(Layer(8192, 4096, 4096, 16)).both.bad
