"""The command of the studies: every method with every seed, or with --tune the grids of learning rates."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState

from examples.demo.report import environment, write_json
from experiments import results
from experiments.settings import METHODS, Settings, parse
from experiments.training import VALIDATION, Cell, Mismatch, Task, run


def command(
    name: str, argv: Sequence[str] | None, description: str, kind: type[Settings], make_task: Callable[..., Task]
) -> int:
    """Run the command ``name``: its settings are a ``kind``."""
    process = PartialState(cpu=not torch.cuda.is_available())
    try:
        settings, tunes, quiet = parse(kind, argv, description)
        settings.expect("batch_size", settings.batch_size % process.num_processes == 0, "a multiple of the processes")
        task = make_task(settings)
        missing = [] if tunes else [m for m in _trained(settings, task) if m not in settings.learning_rates]
        settings.expect("learning_rates", not missing, f"rates of {', '.join(missing)} too (--tune chooses them)")
    except (ValueError, OSError) as error:
        raise SystemExit(f"{name}.py: {error}") from error
    try:
        return (tune if tunes else compare)(settings, task, quiet, name)
    except Mismatch as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1


def _trained(settings: Settings, task: Task) -> list[str]:
    return [m for m in settings.methods if METHODS[m].trains != "head" or task.head is not None]


def compare(settings: Settings, task: Task, quiet: bool, name: str) -> int:
    """Run every method with every seed, print the table, write JSON and picture."""
    runs = []
    for seed in range(settings.seeds):
        for method in settings.methods:
            cell = Cell(method, seed, settings.learning_rates.get(method, 0.0), settings)
            runs.append(run(cell, task, quiet, save_merged=seed == 0))
    if PartialState().is_main_process:
        titles = {m: METHODS[m].title if m in _trained(settings, task) else "frozen" for m in settings.methods}
        record = {"environment": environment(), "settings": asdict(settings), "fingerprint": task.fingerprint()}
        results.write(runs, record, titles, task.metric, task.higher_is_better, Path(settings.output) / name)
    return 0


def tune(settings: Settings, task: Task, quiet: bool, name: str) -> int:
    """Run the grids on the validation split, print and write them and the best rates."""
    rows = []
    tuned = replace(settings, test_examples=None)
    for method, rate in ((m, rate) for m in settings.methods for rate in settings.grids.get(m, ())):
        seeds = range(settings.tuning_seed, settings.tuning_seed + settings.tuning_seeds)
        scores = [run(Cell(method, seed, rate, tuned, VALIDATION), task, quiet)["score"] for seed in seeds]
        means = {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}
        rows.append({"method": method, "learning_rate": rate, **means})
    if PartialState().is_main_process:
        best = results.best_rates(rows, task.metric, task.metric in task.higher_is_better)
        for row in rows:
            chosen = " (best)" if best.get(row["method"]) == row["learning_rate"] else ""
            print(f"{row['method']:<14} {row['learning_rate']:<8g} {row[task.metric]:.4f}{chosen}")
        record = {"environment": environment(), "settings": asdict(settings), "rows": rows, "best": best}
        write_json(Path(settings.output) / "tune.json", record)
    return 0
