"""``python -m bench.model``: what the branch of a layer would add on an H100, kernel by kernel, MODELLED.

Nothing here was measured: it serves to compare designs. ``--check`` prints how many kernels a call launches at most,
how long the last waves leave the GPU idle and how much is under way, and exits with 1 where one of these is off.
"""

import argparse
import math
import sys
from collections.abc import Iterator

from bench.model.cuda_launches import (
    H100,
    Kernel,
    Layer,
    Range,
    kernels,
    overhead,
)

# (K, N) of the linear layers of Llama 8B and 70B and of Qwen3 4B.
LAYERS = (
    (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192),
    (2560, 4096), (2560, 9728), (9728, 2560),
)  # fmt: skip
ROWS = (1, 64, 512, 2048, 8192, 32768, 131072)
RANKS = (8, 16, 32, 64)
# Layers that share x, of Llama 8B and of an attention whose heads are not grouped.
GROUPS = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "q, k, v of one size": (4096, (4096,) * 3),
    "gate, up": (4096, (14336,) * 2),
}
MOST_TAIL = 0.10  # of the time of a large call
MOST_FORWARD, MOST_ROUND = 3, 6  # launches beside the frozen products
# Bytes that a pass over x or dy of a large call has under way on a multiprocessor: rate x latency / multiprocessors.
LEAST_UNDER_WAY = H100.memory.good * H100.latency.bad / H100.multiprocessors


def assumptions() -> Iterator[str]:
    yield f"assumed of an {H100.name}                    good       bad"
    for name, scale, unit in (
        ("memory", 1e-12, "TB/s"), ("l2", 1e-12, "TB/s"), ("latency", 1e6, "us"), ("launch", 1e6, "us"),
        ("hidden", 1e6, "us of a launch behind a kernel of this package"),
        ("unhidden", 1, "of the read of a GEMM's third operand"),
    ):  # fmt: skip
        value: Range = getattr(H100, name)
        yield f"  {name:30}{value.good * scale:10.2f}{value.bad * scale:10.2f}  {unit}"
    yield f"  {'gemm':30}{H100.gemm / 1e12:10.0f}{H100.gemm / 1e12:10.0f}  TFLOP/s"


_HEAD = (
    f"  {'kernel':12}{'launches':>8}{'grid':>12}{'stages':>7}{'blocks/SM':>10}{'waves':>7}{'HBM MB':>8}{'L2 MB':>7}"
    f"{'KB/SM under way':>16}{'us':>15}  bound by"
)


def table(layer: Layer, float_weights: bool) -> Iterator[str]:
    whole = overhead(layer, float_weights=float_weights)
    n, r = (", ".join(map(str, size)) for size in zip(*layer.members, strict=True))
    yield (
        f"\nM={layer.m} K={layer.k} N={n} r={r}, A and B in {_dtype(float_weights)}: "
        f"{shown(whole.forward)} forward, {shown(whole.backward)} backward, {shown(whole.both)} of the frozen GEMMs"
    )
    yield _HEAD
    for direction in kernels(layer, float_weights=float_weights):
        yield from map(line, direction)


def _dtype(float_weights: bool) -> str:
    return "float32" if float_weights else "16 bits"


def line(kernel: Kernel) -> str:
    (good, bound), (bad, bad_bound) = (kernel.seconds(H100, which) for which in ("good", "bad"))
    grid = "x".join(map(str, kernel.grid))
    return (
        f"  {kernel.name:12}{kernel.launches:>8}{grid:>12}{kernel.stages:>7}{kernel.blocks:>10}"
        f"{kernel.waves:>7.2f}{kernel.hbm / 1e6:>8.1f}{kernel.l2 / 1e6:>7.1f}{kernel.under_way / 1024:>16.0f}"
        f"{good * 1e6:>7.1f} to {bad * 1e6:.1f}  {bound if bound == bad_bound else f'{bound} or {bad_bound}'}"
    )


def shown(percent: Range) -> str:
    return f"{percent.good:.1f}% to {percent.bad:.1f}%"


def check() -> bool:
    """Print each figure with its bound and return whether all hold."""
    holds = True

    def figure(text: str, value: float, most: float, told: str = "") -> None:
        nonlocal holds
        holds &= value <= most
        print(f"{'ok    ' if value <= most else 'MISSED'} {text}: {value:.2f}, at most {most:.2f}{told}")

    every = [Layer(m, k, n, r) for k, n in LAYERS for m in ROWS for r in RANKS]
    every += [
        Layer(m, k, n, (r,) * len(n)) for k, n in GROUPS.values() for m in ROWS for r in RANKS if takes(len(n), r)
    ]
    figure("launches of a forward, most of all calls", max(map(forward_launches, every)), MOST_FORWARD)
    figure(
        "launches of a backward, in each round of rows, most of all calls", max(map(round_launches, every)), MOST_ROUND
    )
    for r in RANKS:
        large = [Layer(m, k, n, r) for k, n in LAYERS for m in ROWS if m >= 8192]
        worst = max((idle(layer), layer) for layer in large)
        figure(f"time in tails, r={r}, worst of the large calls {worst[1][:3]}, %", 100 * worst[0], 100 * MOST_TAIL)
        least = min((under_way(layer), layer) for layer in large)
        text = f"under way, r={r}, least of the large calls {least[1][:3]}, % of what memory asks for, missing"
        figure(text, max(0.0, 100 - 100 * least[0] / LEAST_UNDER_WAY), 0.0)
    return holds


def takes(members: int, r: int) -> bool:
    """Return whether the kernels take so many layers of that rank together."""
    return r <= 32 and members * math.ceil(r / 16) * 16 <= 64


def under_way(layer: Layer) -> int:
    """Return the bytes under way on a multiprocessor in the kernel that has least of them, small kernels aside."""
    return min(kernel.under_way for direction in kernels(layer) for kernel in direction if kernel.under_way)


def forward_launches(layer: Layer) -> int:
    return sum(kernel.launches for kernel in kernels(layer)[0])


def round_launches(layer: Layer) -> float:
    """Return the launches of a backward for each part of the rows that it takes at once, of which the last one sums."""
    backward = kernels(layer)[1]
    return sum(kernel.launches for kernel in backward) / max(kernel.launches for kernel in backward)


def idle(layer: Layer) -> float:
    """Return the share of the modelled time of a branch in which the last waves of its kernels leave the GPU idle."""
    each = [kernel for direction in kernels(layer) for kernel in direction]
    spent = sum(kernel.seconds(H100, "bad")[0] for kernel in each)
    return 1 - sum(kernel._replace(busy=1.0).seconds(H100, "bad")[0] for kernel in each) / spent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    for name, default in (("m", 8192), ("k", 4096), ("n", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--r", type=int, nargs="+", default=[16])
    parser.add_argument("--half", action="store_true", help="A and B in 16 bits; by default float32, as PEFT has them")
    parser.add_argument("--check", action="store_true", help="launches, tails, bytes under way; exit 1 if one is off")
    options = parser.parse_args(arguments)
    print("MODELLED, not measured")
    print(*assumptions(), sep="\n")
    if options.check:
        return 0 if check() else 1
    lone = {"m": 8192, "k": 4096, "n": 4096}
    for r in options.r:
        print(*table(Layer(options.m, options.k, options.n, r), not options.half), sep="\n")
    if {name: getattr(options, name) for name in lone} == lone:
        for k, n in GROUPS.values():
            for r in options.r:
                if takes(len(n), r):
                    print(*table(Layer(options.m, k, n, (r,) * len(n)), not options.half), sep="\n")
    print("\nAt identity the same kernels are launched.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
