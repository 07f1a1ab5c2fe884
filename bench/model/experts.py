"""The experts of a model on an H100, MODELLED: torch's ``grouped_mm`` and the branch's kernels behind it, against one
grouped GEMM that begins with the branch.

Both products are taken to run at the rate of a large GEMM, or as fast as HBM allows. Two shares of that rate say what
this leaves out for Triton's: at which one both ways take as long, and which one L2 allows, from where its tiles read
their operands again and again (a library lets neighbouring blocks share these reads).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from afa_kernels.backend.interface import Rows
from afa_kernels.backend.triton.backend import BACKEND
from afa_kernels.backend.triton.launch import recording
from afa_kernels.operator.options import Spec
from bench.model import traffic

TOKENS = 8192
# (experts, experts of a token, N, K) of each fused parameter.
PARAMETERS = {
    "Qwen3-30B-A3B gate_up": (128, 8, 1536, 2048),
    "Qwen3-30B-A3B down": (128, 8, 2048, 768),
    "Mixtral-8x7B gate_up": (8, 2, 28672, 4096),
    "Mixtral-8x7B down": (8, 2, 4096, 14336),
}


class Way(NamedTuple):
    """Microseconds of a forward and a backward: those in the products with the weights, and the others."""

    product: float
    rest: float

    @property
    def whole(self) -> float:
        return self.product + self.rest


def _empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ways(experts: int, top_k: int, n: int, k: int, r: int, gpu: traffic.Gpu) -> tuple[float, Way, Way, float]:
    """Return the microseconds of the frozen products alone, of both ways, and the share that L2 allows; rows in equal
    parts."""
    m = TOKENS * top_k
    x, a, b = _empty(m, k), _empty(experts, r, k), _empty(experts, n, r)
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * (m // experts)
    spec, rows = Spec("silu", 2.0, 0), Rows(ends, None, None)
    alpha_t, z, weight = _empty(experts, dtype=torch.float32), _empty(m, r), _empty(experts, n, k)
    call, branch = (a, b, z, alpha_t, None, spec, rows), (a, b, alpha_t, None, spec, rows)
    needs = {"need_da": True, "need_db": True}
    y, dx = _empty(m, n), _empty(m, k)
    with recording(gpu.device) as beside:
        BACKEND.forward(x, *branch, base=y, out=y, save_z=True)
        BACKEND.backward(_empty(m, n), x, *call, need_dx=True, dx=dx, **needs)
    with recording(gpu.device) as fused:
        BACKEND.linear_forward(x, weight, None, *branch, save_z=True)
        BACKEND.linear_backward(_empty(m, n), x, weight, *call, **needs)

    def product(flops: int, hbm: int) -> float:
        return 1e6 * (gpu.launch + max(flops / gpu.gemm, hbm / gpu.hbm))

    frozen = 2 * product(2 * m * n * k, 2 * (m * k + m * n + experts * n * k))
    gemms, others = [], []
    for cost in map(traffic.cost, fused):
        (gemms if cost.name == traffic.GROUPED_GEMM else others).append(cost)
    one = Way(sum(product(c.flops, c.hbm) for c in gemms), 1e6 * sum(c.seconds(gpu) for c in others))
    beside = Way(frozen, 1e6 * sum(traffic.cost(launch).seconds(gpu) for launch in beside))
    allowed = min(c.flops / gpu.gemm / ((c.hbm + c.l2) / gpu.all_memory) for c in gemms)
    return frozen, beside, one, allowed


def table(ranks: list[int], gpu: traffic.Gpu = traffic.H100) -> Iterator[str]:
    yield f"{TOKENS} tokens in 16 bits, forward and backward, in us"
    yield f"{'':24}{'r':>4}{'frozen':>8}{'grouped_mm, branch':>22}{'one GEMM':>18}{'even at':>9}{'L2 allows':>11}"
    for name, shape in PARAMETERS.items():
        for r in ranks:
            frozen, beside, one, allowed = ways(*shape, r, gpu)
            apart, together = (f"{way.whole:.0f} ({100 * (way.whole / frozen - 1):.1f}%)" for way in (beside, one))
            even = one.product / (beside.whole - one.rest)
            yield f"{name:24}{r:>4}{frozen:>8.0f}{apart:>22}{together:>18}{even:>9.2f}{allowed:>11.2f}"
