"""An MLP block on an H100, MODELLED: its layers one by one, with gate and up as one call, and the block as one call
(:func:`afa_kernels.fuse_mlp`), which keeps less for the backward and computes it again.

A step is the frozen products, the branches' kernels (cuda_launches.py), and the elementwise operations between them, of
which each reads or writes a tensor at the rate of HBM. How many these are is counted: all three ways run here, small.
"""

import operator
from collections import Counter
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import afa_kernels as afa
from bench.model.cuda_launches import H100, HALF, Gpu, Layer, Range, overhead
from bench.transformer import MLP

TOKENS = 8192
BLOCKS = {"Llama-3-8B": (4096, 14336), "Qwen3-8B": (4096, 12288), "Qwen3-1.7B": (2048, 6144)}
WAYS = ("one by one", "gate and up together", "as one call")


class _Passes(TorchDispatchMode):
    """Counts the tensors that elementwise operations read or write, by their number of elements."""

    def __init__(self):
        super().__init__()
        self.counted: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.Tag.pointwise in function.tags:
            self.counted.update(t.numel() for t in (*args, result) if isinstance(t, Tensor))
        return result


@cache
def passes(way: str) -> tuple[int, int]:
    """Return how many tensors of the hidden and of the wide size a forward and a backward read and write between the
    layers, and before the gradient of x is there."""
    m, hidden, wide = 8, 32, 96
    model = nn.Sequential(MLP(hidden, wide))
    afa.inject(model, "all-linear", r=4, share_inputs=way == WAYS[1], fuse_mlp=way == WAYS[2])
    with _Passes() as mode:
        x = torch.randn(m, hidden, requires_grad=True)
        mode.counted.clear()
        model(x).backward(torch.ones(m, hidden))
    return mode.counted[m * hidden], mode.counted[m * wide]


def microseconds(hidden: int, wide: int, r: int, way: str, gpu: Gpu = H100) -> tuple[float, Range, Range]:
    """Return those of the frozen products, of the branches and of the elementwise operations."""
    layers = [Layer(TOKENS, hidden, (wide, wide), (r, r))] if way != WAYS[0] else [Layer(TOKENS, hidden, wide, r)] * 2
    layers.append(Layer(TOKENS, wide, hidden, r))
    products = [2e6 * layer.gemm_flops / gpu.gemm for layer in layers]
    shares = zip(*(overhead(layer, gpu).both for layer in layers), strict=True)
    branches = Range(*(sum(map(operator.mul, products, share)) / 100 for share in shares))
    narrow, broad = passes(way)
    elements = TOKENS * (narrow * hidden + broad * wide)
    elementwise = Range(*(1e6 * HALF * elements / rate for rate in gpu.memory))
    return sum(products), branches, elementwise


def table(ranks: list[int]) -> Iterator[str]:
    yield f"{TOKENS} tokens in 16 bits, forward and backward, in us; SwiGLU, A and B in float32"
    yield f"{'':12}{'r':>4}  {'way':22}{'frozen':>8}{'branches':>16}{'elementwise':>16}{'step':>18}"
    for name, shape in BLOCKS.items():
        for r in ranks:
            for way in WAYS:
                frozen, *parts = microseconds(*shape, r, way)
                whole = Range(*(frozen + sum(part[i] for part in parts) for i in (0, 1)))
                shown = [f"{part.good:.0f} to {part.bad:.0f}" for part in (*parts, whole)]
                yield f"{name:12}{r:>4}  {way:22}{frozen:>8.0f}{shown[0]:>16}{shown[1]:>16}{shown[2]:>18}"
