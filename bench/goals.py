"""Which rows of results the tables of the documents show, and how these rows stand beside the goals of the project."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bench.providers import measured_again

OURS = "afa"
DTYPE_NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "f64": "fp64"}


class Table(NamedTuple):
    """The rows of one pass in one scope, and the providers that ours is compared with there."""

    title: str
    scope: str
    step: str
    others: tuple[str, ...]
    alphas: tuple[float, ...] = (0.5,)


STEP = Table("training step", "model", "both", ("peft", "torchtune", "eager", "afa.torch"), (0.5, 0.0))
LAYER = Table("adapter tax", "layer", "both", ("peft", "torchtune", "eager", "compiled", "afa.torch"))
BRANCH = Table("branch alone", "branch", "both", ("eager", "afa.torch"))
DECODE = Table("decoding", "branch", "inference", ("eager", "afa.torch"))
TABLES = (STEP, LAYER, BRANCH, DECODE)
_THROUGH_PEFT = (OURS, "afa.peft", "afa.accelerate")

Measured = dict[str, dict[str, object]]  # the rows of one problem by provider


def measured(rows: Iterable[dict], table: Table) -> Iterator[tuple[str, Measured]]:
    """Yield a title and the rows of each problem of ``table``, by dtype, alpha_t and then in the order of ``rows``."""
    found: dict[tuple, Measured] = {}
    for row in rows:
        wanted = (row["scope"], row["pass"]) == (table.scope, table.step) and row["alpha_t"] in table.alphas
        plain = not row["dropout"] and row["adapter_dtype"] == row["dtype"]
        if wanted and plain and (row["cache"], row["launch"]) == ("hot", "eager"):
            problem = tuple(row[name] for name in ("dtype", "alpha_t", "m", "k", "n", "r"))
            found.setdefault(problem, {})[row["provider"]] = row
    names = list(DTYPE_NAMES)
    for problem in sorted(found, key=lambda key: (names.index(key[0]), table.alphas.index(key[1]))):
        if OURS in found[problem]:
            yield " ".join([DTYPE_NAMES[problem[0]], *map(str, problem[2:])]), found[problem]


def standing(rows: list[dict]) -> Iterator[str]:
    """Yield how many comparisons ours wins, and for each goal what was measured, what is wanted and whether that is
    met."""
    for table in TABLES:
        owns = [problem[OURS] for _, problem in measured(rows, table)]
        pairs = [(own["ratio"][o], own["ratio_interval"][o]) for own in owns for o in table.others if o in own["ratio"]]
        if pairs:
            faster, clearly = sum(value < 1 for value, _ in pairs), sum(high < 1 for _, (_, high) in pairs)
            yield (
                f"{table.title}: afa takes less time in {faster} of {len(pairs)} comparisons, "
                f"in {clearly} by more than the error"
            )
    steps, layers, branches = ([problem for _, problem in measured(rows, table)] for table in (STEP, LAYER, BRANCH))
    through_peft = [problem.get(name, {}) for problem in steps for name in _THROUGH_PEFT]
    shares = [row["peft_share"] for row in through_peft if "peft_share" in row]
    yield from _goal("tax of a training step over that of PEFT's LoRA", shares, at_most=0.6)
    taxed = [problem[OURS] for problem in layers if "tax" in problem[OURS]]
    yield from _goal("adapter tax over its floor", [own["tax"] / own["floor_tax"] for own in taxed], at_most=1.5)
    for other, wanted in (("eager", 3.0), ("afa.torch", 1.5)):
        those = [problem for problem in branches if OURS in problem.get(other, {}).get("ratio", {})]
        if those:
            # What no implementation can exceed: every product at the rate of the frozen layer's GEMM, or every byte
            # at the rate of a copy.
            limit = geometric_mean([problem[other]["p50_ms"] / problem[OURS]["floor_ms"] for problem in those])
            name = f"branch alone, {other} over afa, geometric mean (of a branch at its floor: {limit:.2f})"
            mean = geometric_mean([problem[other]["ratio"][OURS] for problem in those])
            yield from _goal(name, [mean], at_least=wanted)
    at_zero = [row["ratio"].get(OURS) for row in rows if row["provider"] == "afa.identity"
               and row["pass"] in ("both", "inference")]  # fmt: skip
    yield from _goal("time at alpha_t = 0 over that at 0.5", [ratio for ratio in at_zero if ratio], at_most=1.05)


def _goal(name: str, values: list[float], at_most: float = math.inf, at_least: float = 0.0) -> Iterator[str]:
    if values:
        wanted = f"at most {at_most}" if at_most < math.inf else f"at least {at_least}"
        met = sum(at_least <= value <= at_most for value in values)
        yield f"goal, {name}: {min(values):.2f} to {max(values):.2f}, {wanted}: met in {met} of {len(values)}"


def self_check(rows: Iterable[dict]) -> dict[str, object] | None:
    """Return how far providers that were measured twice are from themselves: the record that ends a file of
    results."""
    pairs = []
    for row in rows:
        first = measured_again(row["provider"])
        if first in row["ratio_interval"]:
            pairs.append((row["ratio"][first], row["ratio_interval"][first]))
    if not pairs:
        return None
    return {
        "kind": "self_check",
        "pairs": len(pairs),
        "include_one": sum(low <= 1 <= high for _, (low, high) in pairs),
        "largest": max(abs(value - 1) for value, _ in pairs),
    }


def self_check_text(check: dict) -> str:
    return (
        f"self-check: the same code measured twice; of {check['pairs']} intervals of its ratio to itself "
        f"{check['include_one']} include 1 (95% are meant to); the largest distance from 1 is "
        f"{100 * check['largest']:.1f}%"
    )


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
