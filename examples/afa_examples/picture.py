"""Accuracy and alpha_t over the steps of training, as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from afa_examples.training import Curve

_BACKGROUND = "#ffffff"
_AVERAGED = 10  # steps
_COLOURS = ("#7f7f7f", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def draw_runs(runs: dict[str, list[dict]], ylabel: str, file: Path) -> None:
    """Draw the mean score of each method over its seeds, its range as a band, and below it alpha_t."""
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7.5, 5.5), height_ratios=(3, 1), facecolor=_BACKGROUND
    )
    for number, (name, own) in enumerate(runs.items()):
        colour = f"C{number}"
        steps = own[0]["progress"]["steps"]
        scores = list(zip(*(run["progress"]["scores"] for run in own), strict=True))
        middle = [sum(values) / len(values) for values in scores]
        if len(steps) == 1:
            above.axhline(middle[0], color=colour, linestyle="--", linewidth=1, label=name)
            continue
        above.plot(steps, middle, color=colour, linewidth=1.2, label=name)
        above.fill_between(steps, *zip(*((min(v), max(v)) for v in scores), strict=True), color=colour, alpha=0.15)
        alpha_t = own[0]["progress"]["alpha_t"]
        if any(alpha_t):
            below.plot(range(len(alpha_t)), alpha_t, color=colour, linewidth=1.2)
    above.set(ylabel=ylabel)
    above.legend(loc="best", framealpha=1.0, edgecolor="none", fontsize=8)
    below.set(xlabel="optimizer step", ylabel="alpha_t", ylim=(-0.05, 1.05))
    _finish(figure, (above, below), file)


def draw_differences(curves: dict[str, tuple[list[float], list[float]]], ylabel: str, file: Path) -> None:
    """Draw differences of the loss, averaged over some steps, above, and alpha_t below."""
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7.5, 5.5), height_ratios=(3, 1), facecolor=_BACKGROUND
    )
    for number, (name, (differences, alpha_t)) in enumerate(curves.items()):
        windows = [differences[max(0, i - _AVERAGED + 1) : i + 1] for i in range(len(differences))]
        above.plot([sum(w) / len(w) for w in windows], color=f"C{number}", linewidth=1.2, label=name)
        below.plot(alpha_t, color=f"C{number}", linewidth=1.2)
        if 0.0 in alpha_t:
            above.axvline(alpha_t.index(0.0), color=f"C{number}", linestyle=":", linewidth=1)
    above.axhline(0.0, color="#333333", linewidth=0.8)
    above.set(ylabel=f"{ylabel} (mean of {_AVERAGED} steps)")
    above.legend(framealpha=1.0, edgecolor="none", fontsize=8)
    below.set(xlabel="optimizer step", ylabel="alpha_t", ylim=(-0.05, 1.05))
    _finish(figure, (above, below), file)


def draw(curves: dict[str, Curve], identity_step: int | None, title: str, file: Path) -> None:
    """Draw accuracy of each method above, alpha_t of those that anneal below, and save ``file``."""
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7.5, 5.5), height_ratios=(3, 1), facecolor=_BACKGROUND
    )
    for colour, (name, curve) in zip(_COLOURS, curves.items(), strict=False):
        above.plot(curve.steps, curve.accuracy, marker="o", markersize=4, color=colour, label=name)
        if any(curve.alpha_t):
            below.plot(range(len(curve.alpha_t)), curve.alpha_t, color=colour, label=name)
    above.set(title=title, ylabel="validation accuracy", ylim=(0, None))
    above.legend(loc="lower right", frameon=False)
    below.set(xlabel="optimizer step", ylabel="alpha_t", ylim=(-0.05, 1.05))
    if identity_step is not None:
        for axes in (above, below):
            axes.axvline(identity_step, color="#999999", linestyle=":", linewidth=1)
        below.set_title(
            f"alpha_t is 0 from step {identity_step} on: a plain LoRA, plain GEMMs",
            fontsize=8,
            loc="right",
        )
    _finish(figure, (above, below), file)


def _finish(figure, all_axes, file: Path) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
