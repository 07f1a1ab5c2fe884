"""``python -m bench.model``: what the branch of a layer would add on an H100, kernel by kernel, MODELLED.

    python -m tools.cuda_report --arch 90 --json report.json
    python -m bench.model --instructions report.json

also holds each kernel to the rate that the instructions of its main loop allow. ``--experts`` is about mixtures of
experts, ``--mlp`` about MLP blocks as one call.

Nothing here was measured: it serves to compare designs. ``--write-counts`` is about calls on this machine, and exact.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.model import counts
from bench.model.cuda_launches import H100, Gpu, Kernel, Layer, Range, kernels, overhead

LONE = {"m": 8192, "k": 4096, "n": 4096}
RANKS = (8, 16, 32, 64)
# Layers that share x, of Llama 8B and of an attention with as many heads for k and v as for q.
SHARED = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "q, k, v of one size": (4096, (4096,) * 3),
    "gate, up": (4096, (14336,) * 2),
}


def assumptions() -> Iterator[str]:
    yield f"assumed of an {H100.card.name}                    good       bad"
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


def table(layer: Layer, gpu: Gpu, float_weights: bool) -> Iterator[str]:
    whole = overhead(layer, gpu, float_weights=float_weights)
    n, r = (", ".join(map(str, size)) for size in zip(*layer.members, strict=True))
    frozen = 2e6 * layer.gemm_flops / H100.gemm
    branch = " to ".join(f"{frozen * percent / 100:.0f}" for percent in whole.both)
    yield (
        f"\nM={layer.m} K={layer.k} N={n} r={r}, A and B in {_dtype(float_weights)}: "
        f"{shown(whole.forward)} forward, {shown(whole.backward)} backward, {shown(whole.both)} of the frozen GEMMs' "
        f"{frozen:.0f} us, or {branch} us"
    )
    yield _HEAD
    for direction in kernels(layer, gpu, float_weights=float_weights):
        yield from (line(kernel, gpu) for kernel in direction)


def _dtype(float_weights: bool) -> str:
    return "float32" if float_weights else "16 bits"


def line(kernel: Kernel, gpu: Gpu) -> str:
    (good, bound), (bad, bad_bound) = (kernel.seconds(gpu, which) for which in ("good", "bad"))
    grid = "x".join(map(str, kernel.grid))
    return (
        f"  {kernel.name:12}{kernel.launches:>8}{grid:>12}{kernel.stages:>7}{kernel.blocks:>10}"
        f"{kernel.waves:>7.2f}{kernel.hbm / 1e6:>8.1f}{kernel.l2 / 1e6:>7.1f}{kernel.under_way / 1024:>16.0f}"
        f"{good * 1e6:>7.1f} to {bad * 1e6:.1f}  {bound if bound == bad_bound else f'{bound} or {bad_bound}'}"
    )


def shown(percent: Range) -> str:
    return f"{percent.good:.1f}% to {percent.bad:.1f}%"


def allowed(report: Path) -> dict[tuple[str, int], float]:
    """Return the rates of sm_90 in a report of tools.cuda_report, by kernel and class of ranks; of two dtypes the lower
    one."""
    rates: dict[tuple[str, int], float] = {}
    for row in map(json.loads, report.read_text().splitlines()):
        if row["arch"] == "90" and row["rate"]:
            key = row["kernel"], row["rank"]
            rates[key] = min(row["rate"], rates.get(key, row["rate"]))
    return rates


def takes(members: int, r: int) -> bool:
    """Return whether the kernels take so many layers of that rank together."""
    return r <= 32 and members * math.ceil(r / 16) * 16 <= 64


def triton_launches(m: int, k: int, n: int, r: int, weights: torch.dtype) -> tuple[list, list]:
    """Return the launches of the ``triton`` backend in a forward and in a backward of a lone layer, x in 16 bits."""
    from afa_kernels.backend.triton.backend import BACKEND
    from afa_kernels.backend.triton.launch import recording
    from afa_kernels.operator.options import Spec
    from bench.model import traffic

    def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    operands = (meta(m, k), meta(r, k, dtype=weights), meta(n, r, dtype=weights))
    alpha_t, spec = meta(dtype=torch.float32), Spec("silu", 2.0, 0)
    with recording(traffic.H100.device) as forward:
        BACKEND.forward(*operands, alpha_t, None, spec, base=None, out=meta(m, n), save_z=True)
    with recording(traffic.H100.device) as backward:
        needs = {"need_dx": True, "need_da": True, "need_db": True}
        BACKEND.backward(meta(m, n), *operands, meta(m, r), alpha_t, None, spec, **needs)
    return forward, backward


def triton_table(m: int, k: int, n: int, r: int, float_weights: bool) -> Iterator[str]:
    from bench.model import traffic

    gpu = traffic.H100
    launches = triton_launches(m, k, n, r, torch.float32 if float_weights else torch.float16)
    forward, backward = ([traffic.cost(launch) for launch in each] for each in launches)
    gemm = 2 * m * k * n / gpu.gemm
    seconds = [sum(cost.seconds(gpu) for cost in each) for each in (forward, backward)]
    percent = [f"{100 * value / gemm:.1f}%" for value in (*seconds, sum(seconds) / 2)]
    yield (
        f"\nM={m} K={k} N={n} r={r}, A and B in {_dtype(float_weights)}: {percent[0]} forward, {percent[1]} backward, "
        f"{percent[2]} of the frozen GEMMs' {2e6 * gemm:.0f} us, or {1e6 * sum(seconds):.0f} us"
    )
    yield f"  {'kernel':30}{'HBM MB':>8}{'L2 MB':>7}{'GFLOP':>7}{'us':>7}"
    for cost in (*forward, *backward):
        yield (
            f"  {cost.name.removesuffix('_kernel'):30}{cost.hbm / 1e6:>8.1f}{cost.l2 / 1e6:>7.1f}"
            f"{cost.flops / 1e9:>7.2f}{cost.seconds(gpu) * 1e6:>7.1f}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    for name, default in LONE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--r", type=int, nargs="+", default=[16])
    parser.add_argument("--half", action="store_true", help="A and B in 16 bits; by default float32, as PEFT has them")
    parser.add_argument("--backend", choices=["cuda", "triton"], default="cuda", help="whose launches (default: cuda)")
    parser.add_argument("--experts", action="store_true", help="instead, fused experts in both ways (experts.py)")
    parser.add_argument("--mlp", action="store_true", help="instead, an MLP block, by its layers or as one call")
    parser.add_argument("--instructions", type=Path, metavar="FILE", help="a report of tools.cuda_report, as JSON")
    parser.add_argument(
        "--write-counts",
        action="store_true",
        help=f"instead, count what calls run and allocate on this machine, and record it in {counts.RECORDED.name}",
    )
    options = parser.parse_args(arguments)
    if options.write_counts:
        print(*counts.write(), sep="\n")
        return 0
    shape = tuple(getattr(options, name) for name in LONE)
    print("MODELLED, not measured")
    if options.experts:
        from bench.model import experts  # which imports Triton

        print(*experts.table(options.r), sep="\n")
        return 0
    if options.mlp:
        from bench.model import mlp

        print(*mlp.table(options.r), sep="\n")
        return 0
    if options.backend == "triton":
        for r in options.r:
            print(*triton_table(*shape, r, not options.half), sep="\n")
        return 0
    gpu = H100 if options.instructions is None else H100._replace(allowed=allowed(options.instructions))
    print(*assumptions(), sep="\n")
    for r in options.r:
        print(*table(Layer(*shape, r), gpu, not options.half), sep="\n")
    if shape == tuple(LONE.values()):
        for k, n in SHARED.values():
            for r in options.r:
                if takes(len(n), r):
                    print(*table(Layer(options.m, k, n, (r,) * len(n)), gpu, not options.half), sep="\n")
    print("\nAt identity the same kernels are launched.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
