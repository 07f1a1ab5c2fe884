"""``python -m bench.scaling``: how the cost grows with M, K, N, r and the number of layers.

Each variable is swept alone, all its values in turn in every round, so that a slow minute of the machine bends no line.
The exponent is the slope of a least-squares line through the logarithms of the medians. 1 is linear growth; below 1, a
constant part dominates.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import allocator
from bench.environment import environment
from bench.problem import Problem
from bench.providers import Provider, providers
from bench.results import Writer
from bench.runner import build
from bench.shapes import DTYPES, TRANSFORMERS, Case
from bench.timed_calls import training_work
from bench.timing import Work, clock_of, measure, quantile
from bench.transformer import Operands, Step

CENTER = {"m": 1024, "k": 1024, "n": 1024, "r": 16}
SWEEPS = {
    "m": [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
    "r": [8, 16, 32, 64, 128],
    "k": [256, 512, 1024, 2048, 4096],
    "n": [256, 512, 1024, 2048, 4096],
    "layers": [1, 2, 4, 8, 16],
}
MODEL = TRANSFORMERS["tiny-transformer"]  # whose layers are counted in blocks
_LAYER_TOKENS = 256


def fit(values: list[int], times: list[float]) -> tuple[float, float]:
    """Return the exponent ``e`` of ``time = c * value ** e``, and the largest distance of a point
    from that line, as a difference of natural logarithms."""
    x, y = [math.log(v) for v in values], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope /= sum((a - mean_x) ** 2 for a in x)
    return slope, max(abs(b - mean_y - slope * (a - mean_x)) for a, b in zip(x, y, strict=True))


def _case(arguments: argparse.Namespace, **changes: int) -> Case:
    shape = CENTER | changes
    return Case(
        scope=arguments.scope,
        layer="scaled",
        bias=False,
        dtype=arguments.dtype,
        adapter_dtype=arguments.dtype,
        alpha_t=0.5,
        activation="silu",
        dropout=0.0,
        device=arguments.device,
        **shape,
    )


def _works(arguments, chosen: dict[str, Provider], variable: str, value: int) -> dict[str, Work]:
    if variable == "layers":
        shape = {"m": _LAYER_TOKENS, "k": MODEL.hidden, "n": MODEL.intermediate}
        case = _case(arguments, **shape)._replace(scope="model")
        operands = Operands.of(MODEL._replace(blocks=value), case)
        steps = {name: Step(provider, case, operands) for name, provider in chosen.items()}
        return {name: Work(step.prepare, {"both": step}) for name, step in steps.items()}
    problem = Problem.of(_case(arguments, **{variable: value}))
    return {name: training_work(build(provider, problem), "hot", "eager") for name, provider in chosen.items()}


def sweep(
    arguments, chosen: dict[str, Provider], variable: str, deadline: float | None = None
) -> Iterator[dict[str, object]]:
    """Yield each provider's exponent in ``variable``, for forward and backward together; nothing after ``deadline`` (of
    ``time.monotonic``)."""
    if deadline and time.monotonic() > deadline:
        return
    values = [value for value in SWEEPS[variable] if variable != "m" or value <= arguments.largest]
    if len(values) < 2:
        return  # no line to fit
    works = {}
    for value in values:
        for name, work in _works(arguments, chosen, variable, value).items():
            work.warm = True  # a small call would otherwise pay for what a large one left in the caches
            works[name, value] = work
    clock = clock_of(arguments.device, arguments.clock)
    measure(works, clock, arguments.seconds * len(values), arguments.precision)
    times = {name: [quantile(works[name, value].samples["both"], 0.5) for value in values] for name in chosen}
    at = {"dtype": arguments.dtype, "device": arguments.device, "scope": arguments.scope}
    if variable == "layers":
        at |= {"scope": "model", "m": _LAYER_TOKENS, "r": CENTER["r"]}
    else:
        at |= {name: value for name, value in CENTER.items() if name != variable}
    for name, medians in times.items():
        exponent, residual = fit(values, medians)
        yield {
            "kind": "exponent",
            "provider": name,
            "variable": variable,
            "values": values,
            "p50_ms": medians,
            "exponent": exponent,
            "log_residual": residual,
            "at": at,
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    add = parser.add_argument
    add("--variables", default=",".join(SWEEPS), help=f"some of {', '.join(SWEEPS)}")
    add("--providers", default="frozen,peft,eager,afa.torch,afa")
    add("--scope", choices=["layer", "branch"], default="layer")
    add("--dtype", choices=[*DTYPES], default="f32")
    add("--device", default="cpu")
    add("--largest", type=int, default=8192, help="the largest M")
    add("--seconds", type=float, default=4.0, help="of timing per value, at most")
    add("--precision", type=float, default=0.02, help="of the ratios; a sweep ends when it is reached")
    add("--budget", type=float, help="stop starting sweeps after this many seconds")
    add("--threads", type=int, help="of torch (default: torch's own)")
    add("--clock", choices=["wall", "process"], default="wall", help="process: for one thread on a busy machine")
    add("--allocator", choices=allocator.NAMES, default="keep", help="whether freed memory is kept for the next call")
    add("--out", type=Path, default=Path("outputs/bench"))
    arguments = parser.parse_args(argv)
    variables = arguments.variables.split(",")
    known = providers()
    names = arguments.providers.split(",")
    unknown = [*(set(variables) - SWEEPS.keys()), *(set(names) - known.keys())]
    if unknown:
        parser.error(f"unknown variables or providers: {', '.join(unknown)}")
    deadline = time.monotonic() + arguments.budget if arguments.budget else None
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = {"clock": arguments.clock, "allocator": allocator.use(arguments.allocator)}
    probe = _case(arguments)
    chosen = {name: known[name] for name in names if known[name].absent(probe) is None}
    writer = Writer(arguments.out / f"scaling_{arguments.scope}_{arguments.dtype}.jsonl")
    command = "python -m bench.scaling " + " ".join(sys.argv[1:] if argv is None else argv)
    writer.write(environment(arguments.device, **options) | {"command": command.strip()})
    print(f"{'variable':8} {'provider':12} {'exponent':>8} {'off by':>7}  p50 ms")
    for variable in variables:
        for record in sweep(arguments, chosen, variable, deadline):
            writer.write(record)
            points = ", ".join(
                f"{value}: {ms:.2f}" for value, ms in zip(record["values"], record["p50_ms"], strict=True)
            )
            off = math.expm1(record["log_residual"])
            print(
                f"{variable:8} {record['provider']:12} {record['exponent']:>8.2f} {off:>6.0%}  {points}",
                flush=True,
            )
    print(f"written to {writer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
