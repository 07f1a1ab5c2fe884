"""What a study makes of its cells: statistics over seeds, a table in Markdown, JSON and a picture."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from examples.demo.picture import save, two_panels
from examples.demo.report import write_json

BASELINE = "lora"
CEILINGS = ("full", "full_adapted")


def gap_closed(method, lora, full):
    """Return ``(method - lora) / (full - lora)``: 0 is no better than LoRA, 1 as good as full fine-tuning. Where there
    is no gap it is not a number."""
    gap = full - lora
    return np.divide(method - lora, gap, out=np.full(np.shape(gap), np.nan), where=gap != 0)


def interval(statistic: Callable, *columns: Sequence[float]) -> tuple[float, float]:
    """Return the 95% percentile interval of ``statistic(*means)`` when seeds are drawn again with replacement.

    Args:
        columns: one value per seed and method, the same seeds in the same order. A resample draws the same seeds of
            every method.
    """

    def of_means(*drawn, axis):
        return statistic(*(values.mean(axis) for values in drawn))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of draws without a gap, which are left out
        options = {"n_resamples": 10_000, "method": "percentile", "rng": np.random.default_rng(0)}
        drawn = bootstrap(columns, of_means, paired=True, **options).bootstrap_distribution
        low, high = np.nanquantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def compare(scores: dict[str, list[float]], higher_is_better: bool = False) -> dict[str, dict[str, Any]]:
    """Return for each method its mean and spread (the standard deviation over seeds), its difference to LoRA, in how
    many seeds it is better, and the gap to each ceiling that it closes, with intervals. Values are lists over the same
    seeds.
    """
    sign = -1.0 if higher_is_better else 1.0
    base = scores.get(BASELINE)
    result = {}
    for name, values in scores.items():
        several = len(values) > 1
        spread = float(np.std(values, ddof=1)) if several else None
        row: dict[str, Any] = {"mean": float(np.mean(values)), "spread": spread, "seeds": len(values)}
        if name != BASELINE and base and several:
            row["minus_baseline"] = float(np.mean(values) - np.mean(base))
            row["minus_baseline_interval"] = interval(lambda a, b: a - b, values, base)
            row["better_seeds"] = sum(sign * a < sign * b for a, b in zip(values, base, strict=True))
            for ceiling in CEILINGS:
                if ceiling in scores and ceiling != name:
                    columns = (values, base, scores[ceiling])
                    row[f"gap_closed_to_{ceiling}"] = float(gap_closed(*map(np.mean, columns)))
                    row[f"gap_closed_to_{ceiling}_interval"] = interval(gap_closed, *columns)
        result[name] = row
    return result


def best_rates(rows: list[dict], metric: str, higher_is_better: bool) -> dict[str, float]:
    """Return the rate with the best score of each method; what diverged (not a number) is never the best."""
    ordered = sorted(
        (row for row in rows if not math.isnan(row[metric])), key=lambda row: row[metric], reverse=not higher_is_better
    )
    return {row["method"]: row["learning_rate"] for row in ordered}  # the last, which is the best, stays


def write(
    runs: list[dict], record: dict[str, Any], titles: dict[str, str], metric: str, higher: Sequence[str], file: Path
) -> None:
    """Print the table of ``runs`` and write them, with ``record``, to ``file`` with the suffixes .json and .png."""
    own = {method: [run for run in runs if run["method"] == method] for method in titles}
    metrics = [metric, *(other for other in runs[0]["score"] if other != metric)]
    summary = {m: compare({k: [r["score"][m] for r in v] for k, v in own.items()}, m in higher) for m in metrics}
    short = [run | {"progress": {k: v for k, v in run["progress"].items() if k not in _OF_STEPS}} for run in runs]
    write_json(file.with_suffix(".json"), record | {"summary": summary, "runs": short})
    draw_runs({titles[method]: of_method for method, of_method in own.items()}, metric, file.with_suffix(".png"))
    rows = []
    for method, row in summary[metric].items():
        cells = [titles[method], *(with_spread(summary[name][method]) for name in metrics)]
        cells.append(with_interval(row, "minus_baseline", "{:+.4f}"))
        cells.append(f"{row['better_seeds']} of {row['seeds']}" if "better_seeds" in row else "")
        cells += [with_interval(row, f"gap_closed_to_{ceiling}", "{:+.1%}") for ceiling in CEILINGS]
        cells += [f"{own[method][0]['learning_rate']:g}", f"{own[method][0]['trainable_parameters']:,}"]
        cells.append(f"{np.mean([run['progress']['cpu_seconds'] for run in own[method]]):.0f}")
        rows.append(cells)
    header = ["method", *metrics, "minus LoRA", "better seeds", *(f"gap to {c} closed" for c in CEILINGS)]
    print("\n" + markdown((*header, "peak lr", "trained", "cpu s"), rows))
    print(f"\nWritten: {file}.json, {file}.png, and of seed 0 adapter/ and merged/ beside them")


_OF_STEPS = ("loss", "reward", "alpha_t")  # values of every step, which stay in the result of the cell


def with_spread(row: dict) -> str:
    return f"{row['mean']:.4f}" if row["spread"] is None else f"{row['mean']:.4f} ± {row['spread']:.4f}"


def with_interval(row: dict, name: str, form: str) -> str:
    if name not in row:
        return ""
    ends = ", ".join(map(form.format, row.get(f"{name}_interval", ())))  # one seed has none
    return form.format(row[name]) + (f" [{ends}]" if ends else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_runs(runs: dict[str, list[dict]], metric: str, file: Path) -> None:
    """Draw the mean score of each method over its seeds, its range as a band, and below it alpha_t."""
    figure, above, below = two_panels()
    for number, (name, own) in enumerate(runs.items()):
        colour, steps = f"C{number}", own[0]["progress"]["steps"]
        scores = np.array([run["progress"]["scores"] for run in own])
        if len(steps) == 1:
            above.axhline(scores.mean(), color=colour, linestyle="--", linewidth=1, label=name)
            continue
        above.plot(steps, scores.mean(0), color=colour, linewidth=1.2, label=name)
        above.fill_between(steps, scores.min(0), scores.max(0), color=colour, alpha=0.15)
        below.plot(own[0]["progress"]["alpha_t"], color=colour, linewidth=1.2)
    _finish(figure, above, below, f"validation: {metric}", file)


def draw_differences(curves: dict[str, tuple[np.ndarray, list[float]]], file: Path) -> None:
    """Draw differences of the training loss, averaged over ten steps, above, and alpha_t below."""
    figure, above, below = two_panels()
    for number, (name, (differences, alpha_t)) in enumerate(curves.items()):
        means = [differences[max(0, i - 9) : i + 1].mean() for i in range(len(differences))]
        above.plot(means, color=f"C{number}", linewidth=1.2, label=name)
        below.plot(alpha_t, color=f"C{number}", linewidth=1.2)
        if 0.0 in alpha_t:
            above.axvline(alpha_t.index(0.0), color=f"C{number}", linestyle=":", linewidth=1)
    above.axhline(0.0, color="#333333", linewidth=0.8)
    _finish(figure, above, below, "training loss minus LoRA's (mean of 10 steps)", file)


def _finish(figure, above, below, ylabel: str, file: Path) -> None:
    above.set(ylabel=ylabel)
    above.legend(loc="best", framealpha=1.0, edgecolor="none", fontsize=8)
    below.set(xlabel="optimizer step", ylabel="alpha_t", ylim=(-0.05, 1.05))
    save(figure, (above, below), file)
