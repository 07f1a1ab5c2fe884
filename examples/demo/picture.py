"""Accuracy and alpha_t over the steps of training, as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .training import Curve

_BACKGROUND = "#ffffff"
_COLOURS = ("#7f7f7f", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def two_panels():
    """Return a figure, its large upper axes and its small lower ones, which share the steps."""
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7.5, 5.5), height_ratios=(3, 1), facecolor=_BACKGROUND
    )
    return figure, above, below


def draw(curves: dict[str, Curve], identity_step: int | None, title: str, file: Path) -> None:
    """Draw accuracy of each method above, alpha_t of those that anneal below, and save ``file``."""
    figure, above, below = two_panels()
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
    save(figure, (above, below), file)


def save(figure, all_axes, file: Path) -> None:
    """Draw the grid, write ``file`` and close the figure."""
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
