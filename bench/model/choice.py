"""What a call would cost on each backend of a GPU, MODELLED: what the choice between ``cuda``, ``triton`` and ``torch``
goes by (``_leaves`` in afa_kernels/backend/cuda.py; python_tests/test_bench_choice.py holds it to this).

``cuda`` is priced by cuda_launches.py, with the products as one more bound of each kernel. The launches of ``triton``
have the bytes of traffic.py, and one or two programs on a multiprocessor. Those of ``torch`` have the bytes of
layer_overhead.py; its GEMMs are taken to fill the GPU, whatever their shape, so that it is flattered.
"""

import math
from typing import NamedTuple

import torch

from afa_kernels.backend.triton.configs import Device
from afa_kernels.backend.triton.launch import Launch
from bench.model.cuda_launches import H100, Gpu, Kernel, Layer, Range, kernels
from bench.model.layer_overhead import torch_backend_costs
from bench.model.traffic import Cost, cost
from tools.triton_aot import Problem


class Card(NamedTuple):
    """A GPU, and what the model assumes of products on it."""

    gpu: Gpu
    device: Device
    # FLOP/s. Each 16 x 8 x 16 product of mma.sync reads 256 bytes of its second operand from shared memory, which gives
    # 128 a clock: 470e12 at an H100's clock, less where the first operand is read, too. Products of a whole warp group
    # (wgmma, tcgen05) share the second operand; there the instructions that Triton puts around them are the limit (on
    # sm_100 those of the x pass leave 770e12 at rank 128, those of the dy pass 410e12).
    mma: Range
    group: Range
    # Of the memory's rate, what a GEMM of torch with a dimension of r columns reaches.
    skinny: Range = Range(0.95, 0.6)


B200 = H100._replace(
    name="B200", multiprocessors=148, memory=Range(7.4e12, 7.0e12), l2=Range(13e12, 9e12),
    latency=Range(0.7e-6, 1.1e-6), gemm=1650e12, l2_alone=64 * 1.85e9,
)  # fmt: skip
CARDS = (
    Card(H100, Device("sm_90", 132, "H100"), Range(470e12, 300e12), Range(650e12, 450e12)),
    Card(B200, Device("sm_100", 148, "B200"), Range(520e12, 330e12), Range(770e12, 410e12)),
)


def prices(layer: Layer, card: Card) -> dict[str, tuple[Range, Range]]:
    """Return the seconds of a forward and of a backward of one layer with float32 A and B, by backend."""
    problem = Problem(layer.m, layer.k, layer.n, layer.r, base=False, weight_dtype=torch.float32)
    triton = [problem.record(card.device, forward=not backward, backward=backward) for backward in (False, True)]
    return {
        "cuda": tuple(_of_cuda(layer, card, direction) for direction in (0, 1)),
        "triton": tuple(_of_triton(each, card) for each in triton),
        "torch": tuple(_of_torch(each, card) for each in torch_backend_costs(problem)),
    }


def _of_cuda(layer: Layer, card: Card, direction: int) -> Range:
    def seconds(which: str) -> float:
        gpu, mma = card.gpu, getattr(card.mma, which)
        return sum(
            max(kernel.seconds(gpu, which)[0], kernel.gaps(gpu, which) + products(kernel) / mma)
            for kernel in kernels(layer, gpu)[direction]
        )

    def products(kernel: Kernel) -> float:
        """Return the FLOPs, as if all multiprocessors had a share of them."""
        blocks = math.prod(kernel.grid) or card.gpu.multiprocessors
        return _flops(layer, kernel.name) * max(1.0, card.gpu.multiprocessors / blocks)

    return Range(seconds("good"), seconds("bad"))


def _flops(layer: Layer, name: str) -> int:
    columns = {
        "forward": layer.k + layer.n, "project": layer.k, "expand": layer.n, "dy": 2 * layer.n, "project_dy": layer.n,
        "x": 2 * layer.k + (layer.n if layer.dy_rank > 32 else 0),
    }.get(name, 0)  # fmt: skip
    return 2 * layer.m * layer.rank * columns


def _of_triton(launches: list[Launch], card: Card) -> Range:
    """Without programmatic dependent launch, with two programs on a multiprocessor or one."""

    def seconds(entry: Launch, which: str) -> float:
        gpu, moved, programs = card.gpu, cost(entry), math.prod(entry.grid)
        waves = programs / (gpu.multiprocessors * (2 if which == "good" else 1))
        share = min(1.0, programs / gpu.multiprocessors)
        fetches = math.ceil(_steps(entry) / max(1, entry.stages - 1))
        times = (
            math.ceil(waves) * fetches * getattr(gpu.latency, which),
            moved.hbm / getattr(gpu.memory, which),
            (moved.hbm + moved.l2) / min(getattr(gpu.l2, which), share * gpu.multiprocessors * gpu.l2_alone),
            moved.flops / (share * getattr(card.group, which)),
        )
        # From the first full wave on, the last one may leave places without a program.
        return getattr(gpu.launch, which) + max(times) * (math.ceil(waves) / waves if waves > 1 else 1.0)

    return Range(*(sum(seconds(entry, which) for entry in launches) for which in ("good", "bad")))


def _steps(entry: Launch) -> int:
    """Return the tiles that a program streams."""
    arguments, constants = entry.arguments, entry.constants
    if "rows_per_chunk" in arguments:
        return math.ceil(min(arguments["rows_per_chunk"], arguments["M"]) / constants["BLOCK_M"])
    if entry.name == "project_partial_kernel":
        return arguments["segment_tiles"]
    streamed = {"xa_phi_hb_forward_kernel": "K", "dyb_dphi_backward_kernel": "N"}.get(entry.name)
    return math.ceil(arguments[streamed] / constants["BLOCK_L"]) if streamed else 1


def _of_torch(costs: list[Cost], card: Card) -> Range:
    """Each operation reads its operands and writes its result; a GEMM's rate falls short of the memory's."""

    def seconds(entry: Cost, which: str) -> float:
        gpu = card.gpu
        reached = getattr(card.skinny, which) if "mm" in entry.name else 1.0
        return getattr(gpu.launch, which) + max(getattr(gpu.latency, which), _moved(entry, card, which) / reached)

    return Range(*(sum(seconds(entry, which) for entry in costs) for which in ("good", "bad")))


def _moved(entry: Cost, card: Card, which: str) -> float:
    memory, l2, group = (getattr(rate, which) for rate in (card.gpu.memory, card.gpu.l2, card.group))
    return max(entry.hbm / memory, (entry.hbm + entry.l2) / l2, entry.flops / group)


def middle(price: dict[str, tuple[Range, Range]]) -> dict[str, float]:
    """Return the seconds of a forward and backward by backend, with the assumptions in the middle."""
    return {name: sum(sum(each) / 2 for each in directions) for name, directions in price.items()}


def cheapest(price: dict[str, float]) -> str:
    return min(price, key=price.get)
