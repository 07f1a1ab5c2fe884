"""The goals, and whether rows of results meet them.

``afa`` takes less time than each other provider on each shape, at alpha_t = 0 as well (met if the median ratio is below
1; "within the error" is added where the interval of the ratio includes 1); its adapter tax is at most 1.5 times the
floor on each shape; over the shapes the branch is, in the geometric mean, 3 times as fast as eager and 1.5 times as
fast as the best composition of torch ops, beside which stands how many times as fast a branch would be that takes no
more than the floor. In a training step of a model the tax of ``afa``, ``afa.peft`` and ``afa.accelerate`` is at most
0.6 of that of PEFT's LoRA. And alpha_t = 0 takes no longer than 0.5: at most as long in the geometric mean over all
cases, and at most 1.05 times as long in each.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bench.providers import measured_again

OURS = "afa"
IDENTITY = "afa.identity"
DTYPE_NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "f64": "fp64"}
_TRAINING = ((2048, 2048, 2048, 16), (4096, 1024, 4096, 16), (512, 4096, 4096, 64))
_DECODING = tuple((m, 4096, 4096, 16) for m in (1, 4, 16))
_STEP = ((512, 1024, 2816, 16),)  # with the hidden and the intermediate size of llama-block


class Goal(NamedTuple):
    """``afa`` is to take less time in one pass of a scope, on some shapes (M, K, N, r), than others do."""

    title: str
    scope: str
    step: str
    shapes: tuple[tuple[int, int, int, int], ...]
    others: tuple[str, ...]
    alphas: tuple[float, ...] = (0.5,)
    # Behind ours at alpha_t = 0 too, measured beside the case: they compute a plain LoRA, or take as long at every
    # alpha_t, since their code is the same.
    others_at_zero: tuple[str, ...] = ()
    largest_tax: float = math.inf  # in floors
    mean_ratios: dict[str, float] = {}  # how many times as fast as another, in the geometric mean
    peft_taxes: tuple[str, ...] = ()  # those whose tax is to be at most LARGEST_OF_PEFT of PEFT's


LARGEST_OF_PEFT = 0.6
LARGEST_IDENTITY_MEAN, LARGEST_IDENTITY = 1.0, 1.05
STEP = Goal(
    "training step",
    "model",
    "both",
    _STEP,
    ("peft", "torchtune", "eager", "afa.torch"),
    alphas=(0.5, 0.0),
    peft_taxes=(OURS, "afa.peft", "afa.accelerate"),
)
LAYER = Goal(
    "adapter tax",
    "layer",
    "both",
    _TRAINING,
    ("peft", "torchtune", "eager", "compiled", "afa.torch"),
    others_at_zero=("peft", "torchtune", "eager", "compiled"),
    largest_tax=1.5,
)
BRANCH = Goal(
    "branch alone",
    "branch",
    "both",
    _TRAINING,
    ("eager", "afa.torch"),
    others_at_zero=("eager",),
    mean_ratios={"eager": 3.0, "afa.torch": 1.5},
)
DECODE = Goal("decoding", "branch", "inference", _DECODING, ("eager",), others_at_zero=("eager",))
GOALS = (STEP, LAYER, BRANCH, DECODE)

Measured = dict[str, dict[str, object]]  # the rows of one problem by provider


class Verdict(NamedTuple):
    met: bool
    unsure: bool  # within the error
    text: str


def measured(rows: Iterable[dict], goal: Goal) -> Iterator[tuple[str, Measured]]:
    """Yield a title and the rows of each problem of ``goal`` that was measured."""
    found: dict[tuple, Measured] = {}
    for row in rows:
        shape = (row["m"], row["k"], row["n"], row["r"])
        wanted = row["scope"] == goal.scope and row["pass"] == goal.step and shape in goal.shapes
        plain = row["alpha_t"] in goal.alphas and not row["dropout"] and row["adapter_dtype"] == row["dtype"]
        if wanted and plain and (row["cache"], row["launch"]) == ("hot", "eager"):
            found.setdefault((row["dtype"], row["alpha_t"], *shape), {})[row["provider"]] = row
    for dtype, name in DTYPE_NAMES.items():
        for alpha_t in goal.alphas:
            for shape in goal.shapes:
                problem = found.get((dtype, alpha_t, *shape), {})
                if OURS in problem:
                    at = [f"{alpha_t:g}"] if len(goal.alphas) > 1 else []
                    yield " ".join([name, *at, *map(str, shape)]), problem


def verdicts(rows: list[dict], goal: Goal) -> Iterator[Verdict]:
    yield from comparisons(rows, goal)
    for title, problem in measured(rows, goal):
        own = problem[OURS]
        if goal.largest_tax < math.inf and own.get("floor_tax") and "tax" in own:
            value = own["tax"] / own["floor_tax"]
            good = value <= goal.largest_tax
            yield _verdict(title, f"tax / floor {value:.2f}, at most {goal.largest_tax}", good)
        for name in goal.peft_taxes:
            if "peft_share" in problem.get(name, {}):
                yield _of_peft(title, problem[name], problem["peft"])
    for other, wanted in goal.mean_ratios.items():
        problems = [problem for _, problem in measured(rows, goal) if OURS in problem.get(other, {}).get("ratio", {})]
        if problems:
            mean = geometric_mean([problem[other]["ratio"][OURS] for problem in problems])
            # What no implementation can exceed: every product at the rate of the frozen layer's GEMM, or every byte
            # at the rate of a copy.
            limit = geometric_mean([problem[other]["p50_ms"] / problem[OURS]["floor_ms"] for problem in problems])
            text = f"{other} / afa {mean:.2f}, at least {wanted}"
            yield _verdict("geometric mean", text, mean >= wanted, f"; {other} / floor {limit:.2f}")


def comparisons(rows: list[dict], goal: Goal) -> Iterator[Verdict]:
    """Yield for each problem and each other provider whether it is behind ours."""
    for title, problem in measured(rows, goal):
        for own, others in ((OURS, goal.others), (IDENTITY, goal.others_at_zero)):
            ratios = problem[own]["ratio"] if own in problem else {}
            for other in others:
                if other in ratios:
                    value, interval = ratios[other], problem[own]["ratio_interval"][other]
                    name = "afa" if own == OURS else "afa at 0"
                    text = f"{name + ' / ' + other:20} {value:.3f}{interval_text(interval, 1, 3)}"
                    yield _verdict(title, text, value < 1, unsure=_includes(interval, 1))


def _of_peft(title: str, own: dict, peft: dict) -> Verdict:
    """Return whether a tax is small beside PEFT's, and whether their intervals are apart."""
    (low, high), (peft_low, peft_high) = own["tax_interval"], peft["tax_interval"]
    share, interval = own["peft_share"], own["peft_share_interval"]
    apart = "apart" if high < peft_low or low > peft_high else "overlap"
    text = f"tax of {own['provider']} {100 * own['tax']:.1f}%, PEFT's {100 * peft['tax']:.1f}%, intervals {apart}; "
    text += f"ratio {share:.2f}{interval_text(interval, 1, 2)}, at most {LARGEST_OF_PEFT}"
    return _verdict(title, text, share <= LARGEST_OF_PEFT, unsure=_includes(interval, LARGEST_OF_PEFT))


def _verdict(title: str, text: str, met: bool, more: str = "", *, unsure: bool = False) -> Verdict:
    outcome = ("met" if met else "not met") + (", within the error" if unsure else "")
    return Verdict(met, unsure, f"{title:27} {text}: {outcome}{more}")


def behind(rows: list[dict]) -> Iterator[str]:
    """Yield how many of the others are behind ours on the shapes of the goals."""
    for goal in GOALS:
        found = list(comparisons(rows, goal))
        if found:
            met = sum(verdict.met for verdict in found)
            clearly = sum(verdict.met and not verdict.unsure for verdict in found)
            yield (
                f"{goal.title}: others behind ours in {met} of {len(found)} comparisons, "
                f"in {clearly} by more than the error"
            )


def identity(rows: list[dict]) -> Iterator[Verdict]:
    """Yield whether alpha_t = 0 takes no longer than the alpha_t of the case, by scope and pass, and in all."""
    found: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if row["provider"] == IDENTITY and row["pass"] in ("both", "inference") and OURS in row["ratio"]:
            found[f"{row['scope']}, {row['pass']}"].append(row)
    if len(found) > 1:
        found["all"] = [row for rows_of_pass in found.values() for row in rows_of_pass]
    for title, those in found.items():
        low, high = (geometric_mean([row["ratio_interval"][OURS][end] for row in those]) for end in (0, 1))
        mean = geometric_mean([row["ratio"][OURS] for row in those])
        text = f"geometric mean of {len(those)} {mean:.3f}{interval_text([low, high], 1, 3)}, at most "
        text += f"{LARGEST_IDENTITY_MEAN:.2f}"
        unsure = _includes([low, high], LARGEST_IDENTITY_MEAN)
        yield _verdict(title, text, mean <= LARGEST_IDENTITY_MEAN, unsure=unsure)
        largest = max(those, key=lambda row: row["ratio"][OURS])
        value, interval = largest["ratio"][OURS], largest["ratio_interval"][OURS]
        shape = " ".join(str(largest[name]) for name in ("dtype", "m", "k", "n", "r"))
        text = f"largest {value:.3f}{interval_text(interval, 1, 3)} ({shape}), at most {LARGEST_IDENTITY:.2f}"
        yield _verdict(title, text, value <= LARGEST_IDENTITY, unsure=_includes(interval, LARGEST_IDENTITY))


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
        "include_one": sum(_includes(interval, 1) for _, interval in pairs),
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


def interval_text(interval: list[float] | None, factor: float, digits: int) -> str:
    if not interval:
        return ""
    low, high = (f"{factor * value:.{digits}f}" for value in interval)
    return f" [{low}, {high}]"


def _includes(interval: list[float], value: float) -> bool:
    return interval[0] <= value <= interval[1]
