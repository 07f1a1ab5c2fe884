"""Compare ways to fine-tune a pretrained model: LoRA, AFA-LoRA, full fine-tuning.

    python -m experiments.sft --config experiments/configs/sft_lm.yaml
    python -m experiments.sft --config experiments/configs/sft_lm.yaml --tune    choose the learning rates
    torchrun --nproc-per-node 2 -m experiments.sft --config experiments/configs/sft_lm.yaml

Every method and seed is a cell: a finished cell is not run again, an interrupted one goes on from its last checkpoint
with the same numbers. A merged model that does not agree with its adapter ends the command with exit code 1.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# Before transformers is imported: --model and --data may name things on the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "0")

from accelerate import Accelerator
from accelerate.utils import set_seed

from examples.demo.report import environment, write_json
from experiments.harness import picture, report, sft_config, sft_tasks, sft_training, statistics
from experiments.harness.adaptation import METHODS
from experiments.harness.sft_config import Settings
from experiments.harness.sft_tasks import Task
from experiments.harness.speculative import OutputMismatch

BASELINE = "lora"
CEILINGS = ("full", "full_adapted")


def main(argv: list[str] | None = None) -> int:
    return command("sft", argv, __doc__)


def command(
    name: str,
    argv: list[str] | None,
    description: str,
    kind: type[Settings] = Settings,
    make_task: Callable[[Settings], Task] = sft_tasks.make,
    run: Callable[..., dict] = sft_training.run,
) -> int:
    """Run the command ``name``: its settings are a ``kind``, ``run`` runs one cell of them."""
    chosen = arguments(argv, description, kind)
    try:
        settings = sft_config.from_flags(chosen, kind)
        task = make_task(settings)
    except ValueError as error:
        raise SystemExit(f"{name}.py: {error}") from None
    accelerator = Accelerator(mixed_precision="bf16" if settings.bf16 else "no", cpu=not _has_accelerator())
    if settings.batch_size % accelerator.num_processes:
        raise SystemExit(
            f"{name}.py: batch_size: expected a multiple of {accelerator.num_processes} processes, "
            f"got {settings.batch_size}"
        )
    set_seed(0)
    try:
        if chosen.tune:
            return tune(settings, task, accelerator, chosen.quiet, run)
        return compare(settings, task, accelerator, chosen.quiet, run, name)
    except (sft_training.MergeMismatch, OutputMismatch) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1


def arguments(
    argv: list[str] | None, description: str = __doc__, kind: type[Settings] = Settings
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    sft_config.add_flags(parser, kind)
    parser.add_argument("--tune", action="store_true", help="run the grids of the file on the validation split")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def compare(
    settings: Settings, task: Task, accelerator: Accelerator, quiet: bool, run: Callable[..., dict], name: str
) -> int:
    """Run every method with every seed, print the table, write JSON and picture."""
    missing = [m for m in settings.methods if m not in settings.learning_rates and not _needs_no_rate(m, task)]
    if missing:
        raise SystemExit(f"{name}.py: learning_rates: none for {', '.join(missing)}; --tune chooses them")
    runs = []
    for seed in range(settings.seeds):
        for method in settings.methods:
            rate = settings.learning_rates.get(method, 0.0)
            cell = sft_training.Cell(method, seed, rate, settings)
            runs.append(run(cell, task, accelerator, quiet, save_merged=seed == 0))
    if not accelerator.is_main_process:
        return 0
    metrics = [task.metric, *(other for other in runs[0]["score"] if other != task.metric)]
    by_method = {m: [r for r in runs if r["method"] == m] for m in settings.methods}
    summary = {
        metric: statistics.compare(
            {m: [r["score"][metric] for r in own] for m, own in by_method.items()},
            BASELINE,
            CEILINGS,
            metric in task.higher_is_better,
        )
        for metric in metrics
    }
    output = Path(settings.output)
    result = {
        "environment": environment(),
        "settings": settings.as_dict(),
        "fingerprint": task.fingerprint(),
        "summary": summary,
        "runs": [_short(r) for r in runs],
    }
    write_json(output / f"{name}.json", result)
    picture.draw_runs(
        {_title(m, task): own for m, own in by_method.items()},
        f"validation: {task.metric}",
        output / f"{name}.png",
    )
    print("\n" + table(summary, runs, task))
    print(f"\nWritten: {output}/{name}.json, {name}.png, and of seed 0: adapter/, merged/")
    return 0


def tune(settings: Settings, task: Task, accelerator: Accelerator, quiet: bool, run: Callable[..., dict]) -> int:
    """Run the grids on the validation split, print and write them and the best rates."""
    rows = []
    tuned = replace(settings, test_examples=None)
    for method in settings.methods:
        for rate in settings.grids.get(method, ()):
            scores = []
            for seed in range(settings.tuning_seed, settings.tuning_seed + settings.tuning_seeds):
                cell = sft_training.Cell(method, seed, rate, tuned, part="validation")
                scores.append(run(cell, task, accelerator, quiet)["score"])
            means = {name: statistics.mean([score[name] for score in scores]) for name in scores[0]}
            rows.append({"method": method, "learning_rate": rate, **means})
            if accelerator.is_main_process:
                print(f"{method:<14} {rate:<8g} {means[task.metric]:.4f}", flush=True)
    if not accelerator.is_main_process:
        return 0
    best = best_rates(rows, task.metric, task.metric in task.higher_is_better)
    for method, rate in best.items():
        grid = settings.grids[method]
        edge = " (an end of the grid)" if len(grid) > 1 and rate in (min(grid), max(grid)) else ""
        print(f"{method}: {rate:g}{edge}")
    result = {"environment": environment(), "settings": settings.as_dict(), "rows": rows, "best": best}
    write_json(Path(settings.output) / "tune.json", result)
    return 0


def best_rates(rows: list[dict], metric: str, higher_is_better: bool = False) -> dict[str, float]:
    """Return the rate with the best score of each method; what diverged (not a number) is never the best."""
    sign = -1 if higher_is_better else 1
    best: dict[str, dict] = {}
    for row in rows:
        held = best.get(row["method"])
        if row[metric] == row[metric] and (held is None or sign * row[metric] < sign * held[metric]):
            best[row["method"]] = row
    return {method: row["learning_rate"] for method, row in best.items()}


def table(summary: dict, runs: list[dict], task: Task) -> str:
    """Return mean and spread of every method and the gaps closed, as a Markdown table."""
    rows = []
    metric = task.metric
    others = [name for name in summary if name != metric]
    for method, row in summary[metric].items():
        own = [r for r in runs if r["method"] == method]
        cells = [_title(method, task), *(_with_spread(summary[name][method]) for name in (metric, *others))]
        cells.append(_with_interval(row, "minus_baseline", "{:+.4f}"))
        cells.append(f"{row['better_seeds']} of {row['seeds']}" if "better_seeds" in row else "")
        cells += [_with_interval(row, f"gap_closed_to_{ceiling}", "{:+.1%}") for ceiling in CEILINGS]
        cells += [f"{own[0]['learning_rate']:g}", f"{own[0]['trainable_parameters']:,}"]
        cells.append(f"{statistics.mean([r['progress']['cpu_seconds'] for r in own]):.0f}")
        rows.append(cells)
    header = ["method", metric, *others, "minus LoRA", "better seeds", *(f"gap to {c} closed" for c in CEILINGS)]
    return report.markdown((*header, "peak lr", "trained", "cpu s"), rows)


def _title(method: str, task: Task) -> str:
    return "frozen" if _needs_no_rate(method, task) else METHODS[method].title


def _with_spread(row: dict) -> str:
    return f"{row['mean']:.4f}" if row["spread"] is None else f"{row['mean']:.4f} ± {row['spread']:.4f}"


def _with_interval(row: dict, name: str, form: str) -> str:
    if name not in row:
        return ""
    low, high = row[f"{name}_interval"]
    return f"{form.format(row[name])} [{form.format(low)}, {form.format(high)}]"


def _needs_no_rate(method: str, task: Task) -> bool:
    return METHODS[method].trains == "head" and task.head is None


def _short(run: dict) -> dict:
    """Return a run without its values of every step, which stay in its cell."""
    progress = {name: run["progress"][name] for name in ("steps", "scores", "cpu_seconds", "seconds")}
    rounded = [round(score, 5) for score in progress["scores"]]
    kept = {name: value for name, value in run.items() if name not in ("identity", "progress")}
    return kept | {"progress": progress | {"scores": rounded}}


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
