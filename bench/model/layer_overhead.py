"""``python -m bench.model.layer_overhead``: the time that a LoRA branch adds to its frozen layer, MODELLED.

Ours beside others, from the bytes and FLOPs of bench/model/traffic.py; nothing here was measured.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from afa_kernels.operator import ops
from afa_kernels.operator.options import Options, Spec
from bench.model.traffic import H100, Cost, Gpu, cost
from tools.triton_aot import Problem


class Overhead(NamedTuple):
    """Modelled extra time over the frozen GEMMs."""

    implementation: str
    forward: list[Cost]
    backward: list[Cost]
    gemm_slowdown: float = 0.0  # relative to the frozen GEMM, of an implementation that replaces it

    def seconds(self, gpu: Gpu, gemm: float) -> tuple[float, float]:
        extra = self.gemm_slowdown * gemm
        return tuple(sum(c.seconds(gpu) for c in costs) + extra for costs in (self.forward, self.backward))


class _OpCosts(TorchDispatchMode):
    """Record each torch op as a kernel that reads its operands and writes its result once, except
    the frozen GEMM."""

    _FREE = ("view", "t", "transpose", "expand", "detach", "alias", "unsqueeze", "empty",
    "empty_like", "permute",
             "_unsafe_view", "empty_strided", "new_empty", "select", "slice")  # fmt: skip
    _WRITES_ONLY = ("copy_", "fill_", "zero_")

    def __init__(self, weight: Tensor):
        super().__init__()
        self._weight = weight.untyped_storage()._cdata
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        operands = [t for t in args if isinstance(t, Tensor)]
        frozen_gemm = name in ("mm", "addmm_", "addmm") and any(
            t.untyped_storage()._cdata == self._weight for t in operands
        )
        if name not in self._FREE and not frozen_gemm:
            read = operands[1:] if name in self._WRITES_ONLY else operands
            results = result if isinstance(result, (tuple, list)) else (result,)
            moved = sum(self._storage_bytes(t) for t in (*read, *results) if isinstance(t, Tensor))
            self.costs.append(Cost(name, moved, 0, 0))
        return result

    @staticmethod
    def _storage_bytes(t: Tensor) -> int:
        return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _eager_overhead(problem: Problem, weight_dtype: torch.dtype, name: str) -> Overhead:
    """PEFT's own sequence of ops with the activation in between, and its autograd backward."""
    m, k, n, r = problem.m, problem.k, problem.n, problem.r
    x, weight = _meta(m, k, grad=True), _meta(n, k)
    a, b = _meta(r, k, dtype=weight_dtype, grad=True), _meta(n, r, dtype=weight_dtype, grad=True)
    with _OpCosts(weight) as forward:
        base = F.linear(x, weight)
        z = F.linear(x.to(weight_dtype), a)
        h = 0.7 * z + 0.3 * F.silu(z)
        y = (base + F.linear(h, b) * 2.0).to(x.dtype)
    with _OpCosts(weight) as backward:
        torch.autograd.grad(y, (x, a, b), torch.empty_like(y))
    return Overhead(name, forward.costs, backward.costs)


def torch_backend_costs(problem: Problem) -> tuple[list[Cost], list[Cost]]:
    """Return what the ``torch`` backend runs beside the frozen GEMMs, forward and backward."""
    m, k, n, r = problem.m, problem.k, problem.n, problem.r
    x, weight, dy = _meta(m, k), _meta(n, k), _meta(m, n)
    a, b = (_meta(*shape, dtype=problem.weight_dtype or problem.dtype) for shape in ((r, k), (n, r)))
    alpha_t, options = _meta(dtype=torch.float32), Options(Spec("silu", 2.0, 0), True, "torch")
    with _OpCosts(weight) as forward:
        _, z = ops.linear_forward(True, weight, None, x, a, b, alpha_t, None, options, None)
    with _OpCosts(weight) as backward:
        ops.linear_backward(True, weight, dy, x, a, b, z, alpha_t, None, options, None, True, True)
    return forward.costs, backward.costs


def _unsloth_overhead(problem: Problem) -> Overhead:
    """The passes of Unsloth's LoRA_W, with phi and phi' as one op each; it forms dy b twice and x
    a^T again."""
    mk, mn = 2 * problem.m * problem.k, 2 * problem.m * problem.n
    forward = [
        _pass("cast a"),
        _pass("x a^T", mk),
        _pass("phi"),
        _pass("cast b"),
        _pass("y += h b^T", 2 * mn),
    ]
    backward = [
        _pass("cast a"), _pass("cast b"), _pass("x a^T", mk), _pass("phi"), _pass("db", mn),
        _pass("dy b", mn), _pass("phi'"), _pass("da", mk), _pass("dy b", mn), _pass("dx += dz a",
        2 * mk),
    ]  # fmt: skip
    return Overhead("Unsloth's order of passes", forward, backward)


def _lorafusion_overhead(problem: Problem, efficiency: float = 0.95) -> Overhead:
    """LoRAFusion's fused GEMM at a share of the plain GEMM's speed, and its dy kernel with float32
    atomics into dh."""
    m, k, n, r = problem.m, problem.k, problem.n, problem.r
    mk, mn = 2 * m * k, 2 * m * n
    atomics = 2 * 4 * m * r * -(-n // 64)  # one read-modify-write of dh for every 64 columns of dy
    forward = [_pass("x a^T", mk), _pass("fused GEMM")]
    backward = [_pass("dh, db", mn, atomics), _pass("da", mk), *(_pass("small") for _ in range(5))]
    return Overhead(f"LoRAFusion, GEMM at {efficiency:.0%}", forward, backward, (1 + r / k) / efficiency - 1)


def _pass(name: str, hbm: int = 0, l2: int = 0) -> Cost:
    return Cost(name, hbm, l2, 0)


def our_overhead(problem: Problem, gpu: Gpu) -> Overhead:
    forward = problem.record(gpu.device, backward=False)
    backward = problem.record(gpu.device, forward=False)
    return Overhead(
        "afa_kernels, triton backend",
        [cost(entry) for entry in forward],
        [cost(entry) for entry in backward],
    )


def overheads(problem: Problem, gpu: Gpu) -> list[Overhead]:
    """Return the modelled overheads of the implementations that we compare with, and ours last."""
    return [
        _eager_overhead(problem, torch.float32, "PEFT, float32 a and b"),
        _eager_overhead(problem, torch.bfloat16, "PEFT, bfloat16 a and b"),
        _unsloth_overhead(problem),
        _lorafusion_overhead(problem),
        Overhead("afa_kernels, torch backend", *torch_backend_costs(problem)),
        our_overhead(problem, gpu),
    ]


def gemm_seconds(problem: Problem, gpu: Gpu) -> float:
    return 2 * problem.m * problem.k * problem.n / gpu.gemm


def percent(overhead: Overhead, problem: Problem, gpu: Gpu) -> tuple[float, float, float]:
    """Return the modelled overhead of the forward, the backward and both, in percent of the frozen
    layer's GEMMs."""
    gemm = gemm_seconds(problem, gpu)
    forward, backward = overhead.seconds(gpu, gemm)
    return 100 * forward / gemm, 100 * backward / gemm, 100 * (forward + backward) / (2 * gemm)


def _megabytes(overhead: Overhead, kind: str) -> str:
    """Return the forward's and the backward's, as "a+b"."""
    passes = (overhead.forward, overhead.backward)
    return "+".join(f"{sum(getattr(entry, kind) for entry in costs) / 1e6:.0f}" for costs in passes)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model.layer_overhead", description=__doc__)
    for name, default in (("m", 8192), ("k", 4096), ("n", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--r", type=int, nargs="+", default=[16, 32, 64, 128])
    options = parser.parse_args(arguments)
    print(f"MODELLED, not measured: {H100.name}, bfloat16, silu, no dropout, M={options.m} K={options.k} N={options.n}")
    for r in options.r:
        problem = Problem(options.m, options.k, options.n, r, base=False)
        print(f"\nr={r}: frozen GEMM {gemm_seconds(problem, H100) * 1e6:.1f} us each way (modelled); % of it are added")
        print(f"{'implementation':30}{'launches':>10}{'HBM MB':>14}{'L2 MB':>12}{'fwd':>9}{'bwd':>7}{'both':>7}")
        for overhead in overheads(problem, H100):
            forward, backward, both = percent(overhead, problem, H100)
            launches = f"{len(overhead.forward)}+{len(overhead.backward)}"
            hbm, l2 = _megabytes(overhead, "hbm"), _megabytes(overhead, "l2")
            print(
                f"{overhead.implementation:30}{launches:>10}{hbm:>14}{l2:>12}{forward:>8.1f}%{backward:>6.1f}%{both:>6.1f}%"
            )
        for entry in our_overhead(problem, H100).forward + our_overhead(problem, H100).backward:
            print(
                f"    {entry.name.removesuffix('_kernel'):28}"
                f"{entry.hbm / 1e6:8.1f} MB HBM {entry.l2 / 1e6:8.1f} MB L2 "
                f"{entry.flops / 1e9:7.2f} GFLOP {entry.seconds(H100) * 1e6:7.1f} us"
            )


if __name__ == "__main__":
    main()
