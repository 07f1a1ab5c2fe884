"""``python -m bench.model.multi_gpu_overhead``: the adapter's cost on 8 GPUs and at 70B parameters, MODELLED.

Nothing here was measured. The time of each adapted layer comes from the traffic model
(bench/model/layer_overhead.py); this file adds the layers of a whole model and what GPUs send each other:

- data parallel: every GPU has its own tokens; the float32 gradients of A and B are all-reduced.
- tensor parallel: q, k, v, gate and up are split by N (A is whole, B split; dz is all-reduced), o
  and down by K (A split, B whole; z is all-reduced). The frozen model all-reduces its activations
  twice per block and direction, with or without an adapter.

Attention, norms and the optimizer are left out: they would only make every overhead smaller.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.environment import environment
from bench.results import Writer

_GPUS = 8
_LINK_BYTES_PER_SECOND = 450e9  # NVLink of an H100, one direction; assumed to be reached
_HALF, _FLOAT = 2, 4


class Model(NamedTuple):
    """Sizes of a Llama; ``kv`` is the width of its key and value projections."""

    name: str
    blocks: int
    hidden: int
    kv: int
    intermediate: int

    def linears(self) -> list[tuple[int, int, int, str]]:
        """Return (count per block, K, N, split by "n" or "k" under tensor parallelism)."""
        h, i = self.hidden, self.intermediate
        return [
            (1, h, h, "n"),
            (2, h, self.kv, "n"),
            (1, h, h, "k"),
            (2, h, i, "n"),
            (1, i, h, "k"),
        ]


LLAMA_8B = Model("llama-3-8b", 32, 4096, 1024, 14336)
LLAMA_70B = Model("llama-3-70b", 80, 8192, 1024, 28672)
CASES = (
    (LLAMA_8B, "single", 1),
    (LLAMA_8B, "data parallel", _GPUS),
    (LLAMA_70B, "tensor parallel", _GPUS),
)


def all_reduce_seconds(nbytes: float, gpus: int) -> float:
    """Return the time of a ring all-reduce, without its latency."""
    return 2 * (gpus - 1) / gpus * nbytes / _LINK_BYTES_PER_SECOND


def steps(model: Model, way: str, gpus: int, tokens: int, r: int) -> Iterator[dict[str, object]]:
    """Yield, per implementation, the modelled milliseconds of all linear layers in one training
    step (``tokens`` per GPU, or per group where tensors are split) and the adapter's share."""
    from bench.model import layer_overhead, traffic
    from tools.triton_aot import Problem

    gpu = traffic.H100
    frozen = 0.0
    extra: dict[str, float] = {}
    parameters = 0
    sent = 0.0  # seconds of communication that the adapters add
    for count, k, n, split in model.linears():
        many = count * model.blocks
        if way == "tensor parallel":
            sent += many * all_reduce_seconds(tokens * r * _HALF, gpus)
            k, n = (k // gpus, n) if split == "k" else (k, n // gpus)
        parameters += many * r * (k + n)
        problem = Problem(tokens, k, n, r, base=False)
        gemm = layer_overhead.gemm_seconds(problem, gpu)
        frozen += many * 2 * gemm
        for overhead in layer_overhead.overheads(problem, gpu):
            name = overhead.implementation
            extra[name] = extra.get(name, 0.0) + many * sum(overhead.seconds(gpu, gemm))
    if way == "data parallel":
        sent = all_reduce_seconds(parameters * _FLOAT, gpus)
    if way == "tensor parallel":
        activations = tokens * model.hidden * _HALF
        frozen += model.blocks * 4 * all_reduce_seconds(activations, gpus)
    for name, seconds in extra.items():
        yield {
            "kind": "modelled",
            "case": f"{model.name}, {way}, r={r}",
            "gpu": gpu.name,
            "gpus": gpus,
            "implementation": name,
            "milliseconds": (frozen + seconds + sent) * 1e3,
            "overhead": (seconds + sent) / frozen,
            "assumptions": {
                "tokens": tokens,
                "hbm_tb_s": gpu.hbm * 1e-12,
                "gemm_tflop_s": gpu.gemm * 1e-12,
                "launch_us": gpu.launch * 1e6,
                "link_gb_s": _LINK_BYTES_PER_SECOND * 1e-9,
                "adapter_parameters_per_gpu": parameters,
                "adapter_communication_ms": sent * 1e3,
            },
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model.multi_gpu_overhead", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="per GPU or tensor-parallel group")
    parser.add_argument("--ranks", default="16,64", help="r, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    arguments = parser.parse_args(argv)
    try:
        from bench.model import layer_overhead  # noqa: F401 - needs Triton, which not every machine has
    except ImportError as error:
        parser.error(f"the traffic model counts the launches of the Triton kernels: {error}")
    writer = Writer(arguments.out / "modelled.jsonl")
    command = " ".join(["python -m bench.model.multi_gpu_overhead", *(sys.argv[1:] if argv is None else argv)])
    writer.write(environment("cpu") | {"command": command})
    print("MODELLED, not measured: linear layers of one training step, bfloat16")
    print(f"{'case':38} {'GPUs':>4}  {'implementation':30} {'ms':>9} {'added':>7}")
    for model, way, gpus in CASES:
        for r in (int(part) for part in arguments.ranks.split(",")):
            for record in steps(model, way, gpus, arguments.tokens, r):
                writer.write(record)
                print(
                    f"{record['case']:38} {gpus:>4}  {record['implementation']:30} "
                    f"{record['milliseconds']:>9.1f} {record['overhead']:>7.1%}"
                )
    print(f"written to {writer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
