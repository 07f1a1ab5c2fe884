"""``make host-time``: the processor time of a call of the ``cuda`` backend before its kernels run, without a GPU.

    make host-time ARGS="--json FILE"

A layer is called on the simulated CUDA runtime of this folder (cuda/). Its launches are counted
and do nothing, and its device memory is the CPU's. So these figures leave out what a GPU adds: the driver's part of
each launch, the look-up of the current stream, and what torch's CUDA allocator takes longer than its CPU one. Each
figure is the median of repetitions, in microseconds of this thread's processor time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import ptx_cuda
import torch

import afa_kernels as afa
from afa_kernels.backend import choice
from afa_kernels.backend.interface import Backend
from afa_kernels.operator.options import Spec

# So small that torch's GEMMs take next to no time.
M, K, N, R = 8, 64, 64, 16
H100 = 1  # its number among the simulated devices


def microseconds(call: Callable[[], object], repetitions: int = 11, calls: int = 500) -> float:
    """Return the median over repetitions of the thread's time for one call."""
    times = []
    for _ in range(repetitions):
        start = time.thread_time_ns()
        for _ in range(calls):
            call()
        times.append((time.thread_time_ns() - start) / calls / 1000)
    return statistics.median(times)


def draw(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, cols).to(dtype)


class Nothing(Backend):
    """A backend that computes nothing: what a call takes above its backend, and in torch."""

    name = "nothing"
    automatic = False

    def __init__(self):
        self.z, self.gradients = draw(M, R), (draw(M, K), draw(R, K, torch.float32), draw(N, R, torch.float32))

    def forward(self, x, a, b, alpha_t, seed, spec, rows=None, *, base, out, save_z):
        return self.z if save_z else None

    def backward(self, dy, x, a, b, z, alpha_t, seed, spec, rows=None, *, need_dx, need_da, need_db):
        return self.gradients


def frozen_layer() -> torch.nn.Linear:
    return torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16).requires_grad_(False)


def of_layer(layer: torch.nn.Module) -> dict[str, float]:
    """Return the time of a layer's forward and of its backward."""
    x, dy = draw(M, K).requires_grad_(), draw(M, N)

    def step():
        layer(x).backward(dy)
        for t in (x, *layer.parameters()):
            t.grad = None

    forward = microseconds(lambda: layer(x))
    return {"forward": forward, "backward": microseconds(step) - forward}


def adapted(backend: str) -> torch.nn.Module:
    """Return a layer whose A and B are float32, as they are by default."""
    return afa.AFALinear(frozen_layer(), r=R, backend=backend)


def of_backend(kernels) -> dict[str, float]:
    """Return the time of the backend's own two functions."""
    x, a, b, y, dy = draw(M, K), draw(R, K, torch.float32), draw(N, R, torch.float32), draw(M, N), draw(M, N)
    alpha_t, spec = torch.tensor(0.5), Spec("silu", 2.0)

    def forward():
        return kernels.forward(x, a, b, alpha_t, None, spec, base=None, out=y, save_z=True)

    z = forward()

    def backward():
        kernels.backward(dy, x, a, b, z, alpha_t, None, spec, need_dx=True, need_da=True, need_db=True)

    return {"forward": microseconds(forward), "backward": microseconds(backward)}


class Recorded:
    """A module that keeps the arguments of its last forward and backward."""

    def __init__(self, module):
        self.module, self.arguments = module, {}

    def __getattr__(self, name):
        function = getattr(self.module, name)
        if name not in ("forward", "backward"):
            return function

        def recorded(*arguments):
            self.arguments[name] = arguments
            return function(*arguments)

        return recorded


def of_module(kernels, module) -> dict[str, float]:
    """Return the time of the compiled part: conversion of arguments, checks, plan, launch code."""
    recorded = Recorded(module)
    kernels._module = recorded
    of_backend(kernels)
    kernels._module = module
    times = {}
    for name, arguments in recorded.arguments.items():
        function = getattr(module, name)
        times[name] = microseconds(lambda f=function, a=arguments: f(*a))
    return times


def of_allocations() -> dict[str, float]:
    """Return the time of what a call of this shape allocates: z; dx, dA, dB and scratch memory."""
    like = draw(1, 1)
    one = microseconds(lambda: like.new_empty(M, R))
    return {"forward": one, "backward": 4 * one}


def of_launches(kernels, runtime) -> dict[str, int]:
    """Return how many kernels a call launches."""
    x, a, b, alpha_t = draw(M, K), draw(R, K, torch.float32), draw(N, R, torch.float32), torch.tensor(0.5)
    scalars, needs = (alpha_t, None, Spec("silu", 2.0)), dict.fromkeys(("need_dx", "need_da", "need_db"), True)
    counts = [runtime.idle_launches()]
    z = kernels.forward(x, a, b, *scalars, base=None, out=draw(M, N), save_z=True)
    counts.append(runtime.idle_launches())
    kernels.backward(draw(M, N), x, a, b, z, *scalars, **needs)
    counts.append(runtime.idle_launches())
    return {"forward": counts[1] - counts[0], "backward": counts[2] - counts[1]}


def measure() -> dict[str, dict[str, float]]:
    """Return the rows of the table."""
    ptx_cuda.register()
    if not ptx_cuda.kernels.status():
        raise SystemExit("host-time: needs nvcc and the PTX machine (AFA_BUILD_PTX_MACHINE=1) in the build")
    nothing, kernels, module = Nothing(), ptx_cuda.kernels, ptx_cuda._cuda_on_ptx
    choice.register(nothing)
    module.runtime.set_current_device(H100)  # as torch has it where a call's tensors are
    module.runtime.set_idle(True)
    torch.manual_seed(0)
    with kernels.on(H100):
        return {
            "a layer": of_layer(adapted(ptx_cuda.NAME)),
            "a layer whose backend does nothing": of_layer(adapted("nothing")),
            "the frozen layer alone, in torch": of_layer(frozen_layer()),
            "the backend": of_backend(kernels),
            "of it compiled: arguments, checks, plan, launches": of_module(kernels, module),
            "of it allocations: results and scratch memory": of_allocations(),
            "launches": of_launches(kernels, module.runtime),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure()
    print(f"microseconds; M={M}, K={K}, N={N}, r={R}, bfloat16, A and B float32; torch {torch.__version__}")
    print(f"  {'':<52}{'forward':>10}{'backward':>10}")
    for name, row in rows.items():
        cells = (f"{value:.2f}" if isinstance(value, float) else value for value in row.values())
        print(f"  {name:<52}" + "".join(f"{cell:>10}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(rows) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
