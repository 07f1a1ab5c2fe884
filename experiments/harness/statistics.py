"""Means over seeds, and how much of a gap a method closes, with what the seeds leave open."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds (n - 1); not a number for one seed."""
    if len(values) < 2:
        return math.nan
    center = mean(values)
    return math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1))


def gap_closed(method: float, lora: float, full: float) -> float:
    """Return ``(method - lora) / (full - lora)``: 0 is no better than LoRA, 1 as good as full fine-tuning."""
    return (method - lora) / (full - lora) if full != lora else math.nan


def paired_bootstrap(
    statistic: Callable[..., float], *columns: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of ``statistic(*means)`` when seeds are drawn again with replacement.

    Args:
        columns: one value per seed and method, the same seeds in the same order. A resample draws the same seeds of
            every method.

    Raises:
        ValueError: the columns have different lengths, or fewer than two values.
    """
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or lengths.pop() < 2:
        raise ValueError(f"columns: expected the same two or more seeds of each, got {[len(c) for c in columns]}")
    values = np.asarray(columns, dtype=np.float64)  # (methods, seeds)
    drawn = np.random.default_rng(seed).integers(values.shape[1], size=(resamples, values.shape[1]))
    means = values[:, drawn].mean(axis=2)  # (methods, resamples)
    results = np.array([statistic(*row) for row in means.T.tolist()])
    low, high = np.nanquantile(results, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def compare(
    scores: dict[str, list[float]], baseline: str, ceilings: Sequence[str], higher_is_better: bool = False
) -> dict[str, Any]:
    """Return for each method its mean and spread, its difference to ``baseline``, in how many seeds it is better, and
    the gap to each ceiling that it closes, with intervals. Values are lists over the same seeds.
    """
    sign = -1.0 if higher_is_better else 1.0
    result = {}
    for name, values in scores.items():
        several = len(values) > 1
        row: dict[str, Any] = {
            "mean": mean(values),
            "spread": spread(values) if several else None,
            "seeds": len(values),
        }
        if name != baseline and baseline in scores and several:
            base = scores[baseline]
            row["minus_baseline"] = mean(values) - mean(base)
            row["minus_baseline_interval"] = paired_bootstrap(lambda a, b: a - b, values, base)
            row["better_seeds"] = sum(sign * a < sign * b for a, b in zip(values, base, strict=True))
            for ceiling in ceilings:
                if ceiling in scores and ceiling != name:
                    columns = (values, base, scores[ceiling])
                    row[f"gap_closed_to_{ceiling}"] = gap_closed(*map(mean, columns))
                    row[f"gap_closed_to_{ceiling}_interval"] = paired_bootstrap(gap_closed, *columns)
        result[name] = row
    return result
