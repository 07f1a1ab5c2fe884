"""Draw every kind of annealing schedule: ``python -m tools.plot_schedules [--out docs]``.

Writes ``schedules.png``, the picture of docs/annealing.md. Needs matplotlib.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the choice of the drawing backend)

from afa_kernels.schedule import KINDS, AnnealSchedule  # noqa: E402

TOTAL_STEPS = 1000
BEGIN_FRAC, END_FRAC = 0.1, 0.8


def draw(folder: Path) -> Path:
    """Write the picture into ``folder`` and return its path."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    steps = range(TOTAL_STEPS + 1)
    for kind, (_, option, default) in KINDS.items():
        schedule = AnnealSchedule(TOTAL_STEPS, kind, begin_frac=BEGIN_FRAC, end_frac=END_FRAC)
        label = f"{kind} ({option}={default:g})" if option else kind
        axes.plot(steps, [schedule(step) for step in steps], label=label, linewidth=1.8)
    axes.axvspan(END_FRAC * TOTAL_STEPS, TOTAL_STEPS, color="0.5", alpha=0.15, linewidth=0)
    axes.text((END_FRAC + 1) / 2 * TOTAL_STEPS, 0.5, "identity:\nplain LoRA", ha="center", va="center")
    axes.set(
        xlabel="optimizer step",
        ylabel="alpha_t",
        xlim=(0, TOTAL_STEPS),
        ylim=(-0.02, 1.02),
        title=f"AnnealSchedule({TOTAL_STEPS}, kind, begin_frac={BEGIN_FRAC}, end_frac={END_FRAC})",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "schedules.png"
    figure.savefig(file, dpi=140)
    plt.close(figure)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    print(draw(parser.parse_args().out))


if __name__ == "__main__":
    main()
