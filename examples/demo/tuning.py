"""The choice of learning rates: a grid per method, judged on the validation split."""

from pathlib import Path

from .classifier import Encoded
from .methods import METHODS, Adapter, prepare
from .training import Recipe, accuracy, train


def tune(
    names: list[str],
    path: str | Path,
    labels: int,
    train_set: Encoded,
    validation_set: Encoded,
    recipe: Recipe,
    adapter: Adapter,
) -> list[dict]:
    """Return the validation accuracy of every method at every rate of its grid; the test split is
    not looked at."""
    rows = []
    for name in names:
        for rate in METHODS[name].grid:
            ready = prepare(name, path, labels, recipe, adapter, rate)
            label = f"{name} {rate:g}"
            curve = train(
                ready.model, ready.groups, train_set, validation_set, recipe,
                schedule=ready.schedule, name=label,
            )  # fmt: skip
            score = accuracy(ready.model, validation_set.evaluation_batches())
            tail = curve.loss[-max(1, len(curve.loss) // 10) :]
            loss = sum(tail) / len(tail)
            rows.append(
                {
                    "method": name,
                    "learning_rate": rate,
                    "validation_accuracy": score,
                    "final_loss": loss,
                }
            )
            print(f"{label:<12} validation accuracy {score:.4f}, loss {loss:.4f}", flush=True)
    return rows


def best_rates(rows: list[dict]) -> dict[str, float]:
    """Return the rate of the best validation accuracy by method; a tie goes to the lower loss."""
    best: dict[str, dict] = {}
    for row in rows:
        key = (row["validation_accuracy"], -row["final_loss"])
        held = best.get(row["method"])
        if held is None or key > (held["validation_accuracy"], -held["final_loss"]):
            best[row["method"]] = row
    return {name: row["learning_rate"] for name, row in best.items()}
