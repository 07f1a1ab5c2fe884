"""Scores, differences of the loss and alpha_t over the steps of training, as pictures."""

from pathlib import Path

from examples.demo.picture import save, two_panels

_AVERAGED = 10  # steps


def draw_runs(runs: dict[str, list[dict]], ylabel: str, file: Path) -> None:
    """Draw the mean score of each method over its seeds, its range as a band, and below it alpha_t."""
    figure, above, below = two_panels()
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
    save(figure, (above, below), file)


def draw_differences(curves: dict[str, tuple[list[float], list[float]]], ylabel: str, file: Path) -> None:
    """Draw differences of the loss, averaged over some steps, above, and alpha_t below."""
    figure, above, below = two_panels()
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
    save(figure, (above, below), file)
