"""The traffic model against the loads and stores that the compiled kernels make, and what it says."""

from dataclasses import replace

import pytest
import torch
from conformance.problems import Problem
from conftest import SIMULATED_GPU

pytest.importorskip("triton")

from afa_kernels.backend.triton import backend, configs, launch  # noqa: E402
from afa_kernels.operator.options import Spec  # noqa: E402
from bench.model import __main__ as command  # noqa: E402
from bench.model import experts, traffic  # noqa: E402


@pytest.mark.skipif(not SIMULATED_GPU, reason="run by test_ptx_triton.py")
@pytest.mark.parametrize("dropout", [0, 60], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize(
    "m, k, n, r, dtype, weight_dtype",
    [
        (70, 72, 50, 16, torch.float32, torch.float32),  # one pass over x, one over dy
        (70, 70, 50, 40, torch.float16, torch.float32),  # packed operands, two passes over dy
        (20, 300, 130, 12, torch.bfloat16, torch.bfloat16),  # few rows: a program for each segment of K
        (20, 140, 300, 100, torch.float32, torch.float32),  # few rows: one for each segment of N, two passes over dy
        (200, 512, 256, 16, torch.bfloat16, torch.bfloat16),  # aligned: asynchronous copies
        (200, 512, 256, 32, torch.bfloat16, torch.float32),  # the same, rounded behind them
        (20, 300, 130, 24, torch.float16, torch.float32),  # of 32 ranks 24 are read
    ],
)
def test_the_model_counts_every_byte(monkeypatch, simulated_gpu, m, k, n, r, dtype, weight_dtype, dropout):
    """In the tiles of the GPU; run by test_ptx_triton.py, in a process for each."""
    if dropout and dtype == torch.float32 and r > 64:
        pytest.skip("overflows the registers")
    x, base, dy = (
        torch.randn(m, k).to(dtype),
        torch.randn(m, n).to(dtype),
        torch.randn(m, n).to(dtype),
    )
    a, b = torch.randn(r, k, dtype=weight_dtype), torch.randn(n, r, dtype=weight_dtype)
    alpha_t, seed, spec = torch.tensor(0.5), torch.tensor(3), Spec("silu", 2.0, dropout)
    counted = counting(monkeypatch, simulated_gpu)
    out = torch.empty_like(base)
    z = backend.BACKEND.forward(x, a, b, alpha_t, seed, spec, base=base, out=out, save_z=True)
    backend.BACKEND.backward(dy, x, a, b, z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=True)
    backend.BACKEND.backward(dy, x, a, b, z, alpha_t, seed, spec, need_dx=True, need_da=False, need_db=False)
    assert len(counted) >= 8
    for entry, made in counted:
        assert_counted(entry, made)


@pytest.mark.skipif(not SIMULATED_GPU, reason="run by test_ptx_triton.py")
@pytest.mark.parametrize("multiprocessors", [1, 108])  # a program for an owner's rows, or for each of its chunks
@pytest.mark.parametrize(
    "sizes, behind, k, n, r, dtype, weight_dtype, ranks",
    [
        ((64, 64, 64), 0, 256, 136, 16, torch.bfloat16, torch.bfloat16, None),  # even
        ((0, 300, 3, 0, 40), 5, 300, 264, 16, torch.float16, torch.float16, None),  # skewed, some empty
        ((33, 70), 0, 264, 300, 40, torch.bfloat16, torch.float32, (40, 7)),  # packed operands, two passes over dy
        ((20, 0, 30, 9), 3, 72, 50, 12, torch.float32, torch.float32, (0, 5, 12, 3)),  # an owner without a branch
        ((300, 3, 40), 5, 300, 264, 24, torch.bfloat16, torch.float32, (24, 7, 16)),  # rounded where they are read
    ],
)
def test_the_model_counts_every_byte_of_rows_by_owner(
    monkeypatch, simulated_gpu, sizes, behind, k, n, r, dtype, weight_dtype, ranks, multiprocessors
):
    """But for those by which a program finds the owner of its rows."""
    device = replace(configs.device_of(torch.device("cpu")), multiprocessors=multiprocessors)
    monkeypatch.setattr(configs, "device_of", lambda _: device)
    p = Problem.of_owners(dtype, sizes, k, n, r, behind=behind, ranks=ranks, weights=weight_dtype, alphas=(0.3, 0.6))
    counted = counting(monkeypatch, simulated_gpu)
    results = p.run(backend.BACKEND)
    p.backward(backend.BACKEND, results, {"dx"})
    p.backward(backend.BACKEND, results, dx=torch.zeros_like(p.x))
    for weights in (len(sizes), 1, 0):  # a matrix for each owner, one for all as a stack of one, and one
        leading = (weights,) if weights else ()
        weight, bias = (torch.randn(*leading, *shape).to(dtype) for shape in ((n, k), (n,)))
        lone = replace(p.outputs[0], base=None, accumulates=False)
        replace(p, kind="experts", weight=weight, bias=bias, outputs=[lone]).run(backend.BACKEND)
    assert len(counted) >= 27
    for entry, made in counted:
        assert_counted(entry, made, traffic.FINDING)


def counting(monkeypatch, simulated_gpu) -> list:
    """Return the launches that follow, each with what it moves, as they come."""
    counted, run = [], launch.Launch.run

    def counted_run(self):
        run(self)
        counted.append((self, simulated_gpu.launched[-1][1]["traffic"]))

    monkeypatch.setattr(launch.Launch, "run", counted_run)
    return counted


def assert_counted(entry: launch.Launch, made: dict, without=frozenset()) -> None:
    modelled = traffic.accesses(entry)
    for name in (modelled.keys() | made.keys()) - without:
        access = tuple(modelled.get(name, traffic.Access()))
        assert made.get(name, (0, 0)) == access, (entry.name, name, made.get(name), access)


@pytest.mark.parametrize("r", [16, 32, 64, 128])
def test_launches(r):
    """One launch forward and four backward, at any rank, where rows fill the device."""
    forward, backward = command.triton_launches(8192, 4096, 4096, r, torch.float16)
    assert (len(forward), len(backward)) == (1, 4)


def test_experts(capsys):
    """The grouped GEMM is worth a measurement: it may be slower than torch's before both ways take as long."""
    assert command.main(["--experts", "--r", "8", "16"]) == 0
    head, _, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "MODELLED, not measured"
    assert len(lines) == 2 * len(experts.PARAMETERS) and all(0.5 < float(line.split()[-2]) < 1 for line in lines)


def test_the_command_says_that_it_is_modelled(capsys):
    assert command.main(["--backend", "triton"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("MODELLED, not measured")
    assert all(name in shown for name in ("forward", "dy_pass", "dphi", "x_pass", "weight_gradients"))
