"""What annealing does to training: variants of AFA-LoRA on the language-modelling task of ``sft.py``.

    python -m experiments.annealing                      every study
    python -m experiments.annealing schedules ranks      some of them

Settings and learning rates are those of ``experiments/configs/sft_lm.yaml`` but for what a study changes. Finished runs
are kept, those of ``sft.py`` too. Writes ``outputs/sft_lm/annealing.json`` and ``annealing.png``.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from examples.demo.report import environment, write_json
from experiments.harness import picture, prototypes, report, sft_config, sft_tasks, sft_training, statistics
from experiments.harness.sft_config import Settings
from experiments.harness.sft_tasks import Task

CONFIG = Path(__file__).parent / "configs" / "sft_lm.yaml"
ANNEALED = "afa_silu"  # the method that the studies vary
MEASURED = ("afa_relu", "afa_silu", "afa_gelu")
LONGER = 3  # times the steps


@dataclass(frozen=True)
class Variant:
    """One row of a study: a method with some settings changed, compared with the row ``against``."""

    label: str
    method: str = ANNEALED
    changes: dict[str, Any] = field(default_factory=dict)
    against: str | None = None

    def cell(self, settings: Settings, seed: int) -> sft_training.Cell:
        rate_of = self.method if self.method in settings.learning_rates else ANNEALED
        return sft_training.Cell(self.method, seed, settings.learning_rates[rate_of], replace(settings, **self.changes))


def schedules(settings: Settings) -> list[Variant]:
    """Return the kinds of schedule, all ending at the same step."""
    kinds = ("cosine", "exponential", "sigmoid", "constant")
    return [
        Variant("LoRA", "lora"),
        Variant("linear", against="LoRA"),
        *(Variant(kind, changes={"schedule": kind}, against="linear") for kind in kinds),
    ]


def ends(settings: Settings) -> list[Variant]:
    """Return where annealing ends, with a learning rate that falls from the warmup on or only from there."""
    rows = []
    for end in (0.3, 0.6, 0.8):
        early = {"decay_from_frac": 0.1}
        waits = {"decay_from_frac": end}
        name = f"{end:.0%}"
        rows += [Variant(f"LoRA, decay from {name}", "lora", waits)]
        rows += [Variant(f"ends at {name}, decay from {name}", changes=waits | {"anneal_end_frac": end})]
        if end == 0.3:
            rows += [Variant("LoRA, decay from 10%", "lora", early)]
        rows += [Variant(f"ends at {name}, decay from 10%", changes=early | {"anneal_end_frac": end})]
    return [row if row.method == "lora" else replace(row, against=f"LoRA, {row.label.split(', ')[1]}") for row in rows]


def ranks(settings: Settings) -> list[Variant]:
    rows = []
    for r in (1, 2, 8):
        changes = {"r": r, "lora_alpha": 2.0 * r}  # the same scale
        rows += [Variant(f"LoRA, r = {r}", "lora", changes)]
        rows += [Variant(f"silu, r = {r}", changes=changes, against=f"LoRA, r = {r}")]
    return rows


def longer(settings: Settings) -> list[Variant]:
    """Return trainings of more steps, evaluated as often."""
    rows = []
    for factor in (1, LONGER):
        steps = factor * settings.steps
        changes = {"steps": steps, "evaluate_every": factor * settings.evaluate_every}
        name = f"{steps} steps"
        rows += [Variant(f"LoRA, {name}", "lora", changes)]
        rows += [Variant(f"silu, {name}", changes=changes, against=f"LoRA, {name}")]
    return rows


def blends(settings: Settings) -> list[Variant]:
    """Return the annealed blends that the package does not have, compared with those that it has."""
    rows = [Variant("LoRA", "lora")]
    rows += [Variant(sft_training.METHODS[name].activation, name, against="LoRA") for name in MEASURED]
    for name, method in prototypes.PROTOTYPES.items():
        if not method.kept:
            rows.append(Variant(method.title, name, against=method.activation))
    return rows


def kept(settings: Settings) -> list[Variant]:
    """Return branches that stay non-linear, which cannot be merged: what is there to gain before annealing?"""
    rows = [Variant("LoRA", "lora")]
    for name, method in prototypes.PROTOTYPES.items():
        if method.kept:
            rows.append(Variant(f"{method.activation}, annealed", f"afa_{method.activation}", against="LoRA"))
            rows.append(Variant(method.title, name, against="LoRA"))
    return rows


STUDIES = {"schedules": schedules, "ends": ends, "blends": blends, "kept": kept, "ranks": ranks, "longer": longer}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help=f"of {', '.join((*STUDIES, 'inputs'))} (all)")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (3)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    chosen = parser.parse_args(argv)
    names = chosen.studies or [*STUDIES, "inputs"]
    unknown = sorted(set(names) - {*STUDIES, "inputs"})
    if unknown:
        parser.error(f"studies: expected some of {', '.join((*STUDIES, 'inputs'))}, got {unknown[0]}")
    settings = sft_config.read(chosen.config)
    task = sft_tasks.make(settings)
    accelerator = Accelerator(cpu=True)
    file = Path(settings.output) / "annealing.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"studies": {}}
    result |= {"environment": environment(), "settings": settings.as_dict()}
    for name in names:
        if name == "inputs":
            rows = inputs(settings, task, accelerator, chosen.seeds)
            print(f"\n{name}\n\n{inputs_table(rows)}", flush=True)
        else:
            rows = study(STUDIES[name](settings), settings, task, accelerator, chosen)
            print(f"\n{name}\n\n{table(rows, task.metric)}", flush=True)
        result["studies"][name] = rows
        write_json(file, result)
    draw(settings, task, chosen.seeds, file.with_suffix(".png"))
    return 0


def study(
    variants: list[Variant], settings: Settings, task: Task, accelerator: Accelerator, chosen: argparse.Namespace
) -> list[dict]:
    """Run the variants and return a row for each, with the paired difference to the row that it is compared with."""
    scores: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for seed in range(chosen.seeds):
        for variant in variants:
            run = sft_training.run(variant.cell(settings, seed), task, accelerator, chosen.quiet)
            scores.setdefault(variant.label, []).append(run["score"][task.metric])
            seconds[variant.label] = run["progress"]["cpu_seconds"]
    rows = []
    for variant in variants:
        values = scores[variant.label]
        row = {"label": variant.label, "against": variant.against, "scores": values}
        row |= {"mean": statistics.mean(values), "spread": statistics.spread(values), "seeds": len(values)}
        row["cpu_seconds"] = seconds[variant.label]
        if variant.against is not None and len(values) > 1:
            base = scores[variant.against]
            differences = [a - b for a, b in zip(values, base, strict=True)]
            row["differences"] = differences
            row["difference"] = statistics.mean(differences)
            row["interval"] = statistics.paired_bootstrap(lambda a, b: a - b, values, base)
        rows.append(row)
    return rows


def table(rows: list[dict], metric: str) -> str:
    lines = []
    for row in rows:
        line = [row["label"], f"{row['mean']:.4f} ± {row['spread']:.4f}"]
        if "difference" in row:
            low, high = row["interval"]
            better = sum(d < 0 for d in row["differences"])
            line += [row["against"], f"{row['difference']:+.4f} [{low:+.4f}, {high:+.4f}]", f"{better}/{row['seeds']}"]
        lines.append(line + [""] * (5 - len(line)))
    return report.markdown(("variant", metric, "compared with", "difference", "seeds better"), lines)


def inputs(settings: Settings, task: Task, accelerator: Accelerator, seeds: int) -> list[dict]:
    """Return how large z is and how much of act(z) no linear map of z can replace, along the annealing."""
    rows = []
    end = int(settings.anneal_end_frac * settings.steps)
    for method in MEASURED:
        activation = sft_training.METHODS[method].activation
        for seed in range(seeds):
            cell = sft_training.Cell(method, seed, settings.learning_rates[method], settings)
            run = sft_training.Run(cell, task, accelerator)
            for step in range(end + 1):
                if step % max(1, end // 4) == 0:
                    with prototypes.InputsOfActivations(run.plain) as seen:
                        task.logits(run.plain)
                    run.plain.train()
                    sizes = [z.abs().mean().item() for z in seen.z]
                    shares = [prototypes.share_of_nonlinearity(z, activation) for z in seen.z]
                    rows.append(
                        {
                            "method": method,
                            "seed": seed,
                            "step": step,
                            "alpha_t": run.schedule.alpha_t,
                            "size": statistics.mean(sizes),
                            "size_range": [min(sizes), max(sizes)],
                            "share": statistics.mean(shares),
                            "share_range": [min(shares), max(shares)],
                        }
                    )
                run.one_step()
    return rows


def inputs_table(rows: list[dict]) -> str:
    """Return means over layers and seeds; in brackets the smallest and largest layer."""
    lines = []
    for method, step in dict.fromkeys((row["method"], row["step"]) for row in rows):
        own = [row for row in rows if row["method"] == method and row["step"] == step]
        line = [sft_training.METHODS[method].title, str(step), f"{own[0]['alpha_t']:.2f}"]
        for name, form in (("size", "{:.2f}"), ("share", "{:.1%}")):
            low = min(row[f"{name}_range"][0] for row in own)
            high = max(row[f"{name}_range"][1] for row in own)
            mean = statistics.mean([row[name] for row in own])
            line.append(f"{form.format(mean)} [{form.format(low)}, {form.format(high)}]")
        lines.append(line)
    return report.markdown(("method", "step", "alpha_t", "mean abs z", "act(z) beyond a linear map"), lines)


def draw(settings: Settings, task: Task, seeds: int, file: Path) -> None:
    """Draw the training loss of AFA-LoRA minus that of LoRA on the same batches: where annealing ends at several steps,
    or, before that study was run, of the activations."""
    where = [variant for variant in ends(settings) if variant.method == ANNEALED and variant.label.endswith("10%")]
    what = [Variant(sft_training.METHODS[name].title, name) for name in MEASURED]
    curves = _differences(where, settings, task, seeds) or _differences(what, settings, task, seeds)
    if curves:
        picture.draw_differences(curves, "training loss minus LoRA's", file)


def _differences(
    variants: list[Variant], settings: Settings, task: Task, seeds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the mean difference of every step, and alpha_t, of the variants that are finished."""
    curves = {}
    for variant in variants:
        pairs = []
        for seed in range(seeds):
            cell = variant.cell(settings, seed)
            plain = Variant("LoRA", "lora", {"decay_from_frac": cell.settings.decay_from_frac}).cell(settings, seed)
            pairs.append((sft_training.finished(cell, task), sft_training.finished(plain, task)))
        if all(one and other for one, other in pairs):
            differences = [
                [a - b for a, b in zip(one["progress"]["loss"], other["progress"]["loss"], strict=True)]
                for one, other in pairs
            ]
            mean = [statistics.mean(step) for step in zip(*differences, strict=True)]
            curves[variant.label] = (mean, pairs[0][0]["progress"]["alpha_t"])
    return curves


if __name__ == "__main__":
    sys.exit(main())
