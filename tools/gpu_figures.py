"""The steps of gpu_check that measure: the questions that the traffic model leaves open, and the
peers.

Every time is the median of interleaved rounds in one process (timing.py).
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.timing import Work, clock_of, measure
from tools.gpu_steps import ROOT, Context, Layer, Outcome, Step

_K_EXTENSION = 64  # columns that [x | h] has beyond x, padded for the GEMM


def medians(steps: dict[str, Callable[[], object]], context: Context) -> dict[str, float]:
    """Return the median milliseconds of each function."""
    works = {
        name: Work(prepare=lambda: None, steps={"call": lambda _, call=call: call()}) for name, call in steps.items()
    }
    measure(works, clock_of(context.device), seconds=0.3 if context.small else 2.0)
    return {name: statistics.median(work.samples["call"]) for name, work in works.items()}


def _size(context: Context) -> tuple[int, int, int]:
    return (32, 64, 64) if context.small else (8192, 4096, 4096)


def measure_beta(context: Context) -> Outcome:
    """Is the beta = 1 operand of the GEMM hidden behind its products?"""
    m, k, n = _size(context)
    layer = Layer.random((m, k, n, 16), context.device)
    y, extended = torch.empty_like(layer.dy), torch.zeros(m, k + _K_EXTENSION).to(layer.x)
    wide = torch.zeros(n, k + _K_EXTENSION).to(layer.x)
    times = medians(
        {
            "mm": lambda: torch.mm(layer.x, layer.weight.T, out=y),
            "addmm_": lambda: y.addmm_(layer.x, layer.weight.T),
            "mm with K extended": lambda: torch.mm(extended, wide.T, out=y),
        },
        context,
    )
    rows = [{"gemm": name, "ms": round(ms, 4)} for name, ms in times.items()]
    return Outcome.ok(
        f"addmm_ / mm {times['addmm_'] / times['mm']:.3f}, K-extended / mm "
        f"{times['mm with K extended'] / times['mm']:.3f} (0.94 of its speed is the break-even)",
        rows,
    )


def measure_bandwidth(context: Context) -> Outcome:
    """GB/s of the branch by rank, forward and backward, and against the reordered torch ops."""
    import afa_kernels as afa

    m, k, n = _size(context)
    rows = []
    for r in (16,) if context.small else (8, 16, 32, 64):
        layer = Layer.random((m, k, n, r), context.device)
        leaves = [t.detach().requires_grad_() for t in (layer.x, layer.a, layer.b)]
        steps = {}
        for backend in ("torch", *context.backends):

            def forward(backend=backend, leaves=leaves, layer=layer):
                return afa.afa_lora(*leaves, layer.alpha_t, backend=backend)

            y = forward()
            steps[f"{backend} forward"] = forward
            steps[f"{backend} backward"] = lambda y=y, leaves=leaves, layer=layer: torch.autograd.grad(
                y, leaves, layer.dy, retain_graph=True
            )
        times = medians(steps, context)
        element = layer.x.element_size()
        moved = {"forward": element * m * (k + n), "backward": element * m * (2 * k + n)}
        for name, ms in times.items():
            backend, direction = name.split()
            rows.append(
                {
                    "r": r,
                    "backend": backend,
                    "pass": direction,
                    "ms": round(ms, 4),
                    "GB/s": round(moved[direction] / ms * 1e-6, 1),
                    "of torch": round(ms / times[f"torch {direction}"], 3),
                }
            )
    return Outcome.ok("bytes are x, y, dx and dy, each once", rows)


def measure_launches(context: Context) -> Outcome:
    """What launches cost at few rows, with and without a CUDA graph."""
    if context.device != "cuda":
        return Outcome.absent("launch gaps need a CUDA device")
    rows = []
    for m in (1, 16, 256, 1024):
        layer = Layer.random((m, 4096, 4096, 16), "cuda")
        steps = {}
        for backend in ("torch", *context.backends):
            for _ in range(3):
                layer.step(backend, dropout_p=0.0)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layer.step(backend, dropout_p=0.0)
            steps[f"{backend} eager"] = lambda backend=backend, layer=layer: layer.step(backend, dropout_p=0.0)
            steps[f"{backend} graph"] = graph.replay
        times = medians(steps, context)
        rows += [{"M": m, "way": name, "ms": round(ms, 4)} for name, ms in times.items()]
    return Outcome.ok("a training step of one layer, K = N = 4096, r = 16", rows)


def measure_peers(context: Context) -> Outcome:
    """Time eager PyTorch, PEFT, torch.compile, Unsloth, Liger and the others with ``python -m
    bench``."""
    command = [sys.executable, "-m", "bench", "--device", context.device, "--no-pictures"]
    if context.small:
        command += ["--quick", "--shapes", "minilm.attention", "--tokens", "16", "--dtypes", "f32"]
        command += ["--providers", "eager,afa", "--scopes", "layer", "--alphas", "0.5"]
    else:
        command += ["--scopes", "branch,layer", "--shapes", "plain.square,plain.wide", "--tokens", "1,1024,8192"]
        command += ["--ranks", "16,64", "--dtypes", "bf16", "--alphas", "0.5,0", "--seconds", "2"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--out", folder, "--name", "peers"], cwd=ROOT, capture_output=True, text=True)
        files = sorted(Path(folder).rglob("*.jsonl"))
        lines = [line for file in files for line in file.read_text().splitlines()]
    if done.returncode or not lines:
        told = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        return Outcome.failed(told[-1])
    return Outcome("ok", f"{len(lines)} records of python -m bench", records=lines)


STEPS = (
    Step("beta", "mm against in-place addmm_ and a K-extended GEMM: what does beta = 1 cost?", measure_beta),
    Step("bandwidth", "GB/s of forward and backward by rank, against the reordered torch ops", measure_bandwidth),
    Step("launches", "a step at few rows, with and without CUDA graphs", measure_launches),
    Step("peers", "timings against eager, PEFT, torch.compile and, where installed, Unsloth and Liger", measure_peers),
)
