"""Fine-tune a real pretrained transformer in four ways, anneal, merge, and load the result in PEFT.

    python -m examples.demo            about two minutes on two cores
    python -m examples.demo --quick    about half a minute: too short to compare the methods

The model is all-MiniLM-L6-v2 (22M parameters), from an installed package; the text is the source of
this Python's standard library; the task is to say which of 20 modules a function comes from. All
methods see the same batches in the same order. The learning rate of each comes from a grid of its
own and was chosen on the validation split (``--tune`` repeats that); the test split is looked at
once, at the end.
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import afa_kernels as afa

from . import checks, data, picture, report, tuning
from .classifier import Classifier, Encoded, packaged_model
from .methods import METHODS, Adapter, prepare
from .training import Curve, Recipe, correct, train, trainable_parameters

# Largest difference of logits, as a part of the largest logit, that float32 rounding may make.
TOLERANCE = 1e-4
FULL = Recipe(steps=160, batch_size=16, evaluate_every=32, curve_examples=192)
QUICK = Recipe(steps=24, batch_size=16, evaluate_every=12, curve_examples=96)
QUICK_TEST_EXAMPLES = 256
CHECKED_BATCHES = 2


@dataclass
class Run:
    """One method trained with one seed."""

    method: str
    seed: int
    accuracy: float
    trainable_parameters: int
    trained_examples: int
    curve: Curve
    correct: torch.Tensor
    model: Classifier | None  # kept for AFA-LoRA, whose adapter is checked

    def as_dict(self) -> dict:
        return {
            "method": self.method,
            "seed": self.seed,
            "learning_rate": METHODS[self.method].learning_rate,
            "test_accuracy": self.accuracy,
            "trainable_parameters": self.trainable_parameters,
            "train_seconds": self.curve.seconds,
            "curve": self.curve.as_dict(),
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a seventh of the steps")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each method (1)")
    parser.add_argument("--model", help="folder or cached name of another encoder")
    parser.add_argument("--rank", type=int, default=4, help="of both adapters (4)")
    parser.add_argument("--activation", default="silu", choices=afa.activations())
    parser.add_argument("--tune", action="store_true", help="choose the learning rates, then stop")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder (outputs)")
    chosen = parser.parse_args()
    if chosen.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {chosen.seeds}")
    return chosen


def main() -> int:
    began = time.perf_counter()
    chosen = arguments()
    recipe = QUICK if chosen.quick else FULL
    adapter = Adapter(chosen.rank, 2.0 * chosen.rank, chosen.activation)
    path = chosen.model or packaged_model()
    splits = data.load()
    encoded = {name: Encoded(getattr(splits, name), splits.labels, path) for name in ("train", "validation", "test")}
    environment = report.environment()
    result = {
        "environment": environment,
        "settings": {"model": str(chosen.model or "all-MiniLM-L6-v2"), "quick": chosen.quick},
        "recipe": asdict(recipe),
        "adapter": asdict(adapter),
        "data": {
            "labels": splits.labels,
            **{name: len(part) for name, part in encoded.items()},
            "near_duplicates_dropped": splits.near_duplicates,
        },
    }
    print(introduction(result))
    if chosen.tune:
        return tune(list(METHODS), path, splits, encoded, recipe, adapter, result, chosen.output)

    test_examples = QUICK_TEST_EXAMPLES if chosen.quick else None
    runs = []
    for seed in range(chosen.seeds):
        for name in METHODS:
            seeded = Recipe(**{**asdict(recipe), "seed": seed})
            runs.append(run(name, path, splits, encoded, seeded, adapter, test_examples))
    annealed = next(r for r in runs if r.method == "afa")
    identity_step = identity_reached(annealed.curve)
    print(
        f"\nalpha_t fell from {annealed.curve.alpha_t[0]:g} to exactly 0 at step {identity_step} "
        f"of {recipe.steps}: from there on the adapter is a plain LoRA.\n"
        f"{plan_of(annealed.model)}"
    )
    passed = check_adapter(annealed.model, path, splits, encoded["test"], chosen.output, result)

    print("\n" + results_table(runs, environment["python"]))
    print(comparison(runs))
    result |= {
        "identity_step": identity_step,
        "runs": [r.as_dict() for r in runs],
        "total_seconds": time.perf_counter() - began,
    }
    report.write_json(chosen.output / "demo.json", result)
    curves = {METHODS[r.method].title: r.curve for r in runs[: len(METHODS)]}
    title = f"Which of {len(splits.labels)} modules does a function come from?"
    picture.draw(curves, identity_step, title, chosen.output / "demo.png")
    print(
        f"\nWritten: {chosen.output / 'demo.png'}, {chosen.output / 'demo.json'}, "
        f"{chosen.output / 'adapter'}/. Total {result['total_seconds']:.0f} s."
    )
    return 0 if passed else 1


def introduction(result: dict) -> str:
    env, sizes = result["environment"], result["data"]
    available = [name for name, state in env["backends"].items() if state == "available"]
    return (
        f"Model {result['settings']['model']}; functions of the standard library of Python "
        f"{env['python']}, {len(sizes['labels'])} modules: {sizes['train']} to train, "
        f"{sizes['validation']} to validate, {sizes['test']} to test "
        f"({sizes['near_duplicates_dropped']} near-duplicates dropped).\n"
        f"torch {env['torch']}, {env['threads']} threads; backends: {', '.join(available)}."
    )


def run(
    name: str,
    path: str | Path,
    splits: data.Splits,
    encoded: dict[str, Encoded],
    recipe: Recipe,
    adapter: Adapter,
    test_examples: int | None,
) -> Run:
    """Train the method ``name`` and measure it on the test split."""
    ready = prepare(name, path, len(splits.labels), recipe, adapter)
    if name == "afa":
        print(plan_of(ready.model))
    curve = train(
        ready.model, ready.groups, encoded["train"], encoded["validation"], recipe,
        schedule=ready.schedule, name=name,
    )  # fmt: skip
    right = correct(ready.model, encoded["test"].evaluation_batches(limit=test_examples))
    return Run(
        name,
        recipe.seed,
        right.double().mean().item(),
        trainable_parameters(ready.model),
        recipe.steps * recipe.batch_size,
        curve,
        right,
        ready.model if name == "afa" else None,
    )


def plan_of(model: Classifier) -> str:
    """Return what the AFA layers of ``model`` do, according to ``afa.plan``."""
    layers = [m for m in model.modules() if isinstance(m, afa.AFALinear)]
    x = torch.zeros(512, layers[0].in_features)
    plan = layers[0].plan(x)
    return (
        f"{len(layers)} AFA layers at alpha_t = {layers[0].alpha_t:g}: backend {plan.backend}, "
        f"path {plan.path} ({plan.reason})"
    )


def identity_reached(curve: Curve) -> int:
    """Return the first step whose forward ran at alpha_t = 0."""
    if 0.0 not in curve.alpha_t:
        raise RuntimeError(f"alpha_t ended at {curve.alpha_t[-1]}, not at 0")
    return curve.alpha_t.index(0.0)


def check_adapter(model: Classifier, path, splits: data.Splits, test_set: Encoded, output: Path, result: dict) -> bool:
    """Load the adapter in stock PEFT, merge it, print both, and return whether both are exact to
    rounding."""
    batches = list(test_set.evaluation_batches(limit=64 * CHECKED_BATCHES))
    labels = len(splits.labels)
    peft = checks.peft_round_trip(model, batches, output / "adapter", Classifier(path, labels))
    merge = checks.merge_check(model, batches, Classifier(path, labels))
    result |= {"peft": peft, "merge": merge}
    allowed = TOLERANCE * merge["largest_logit"]
    passed = (
        peft["largest_logit_difference"] <= allowed
        and merge["largest_logit_difference"] <= allowed
        and merge["path"] == "merged"
        and merge["runs_the_plain_layers"]
        and merge["unloaded_equals_merged"]
        and merge["layers_left"] == 0
    )
    plain = "the same as" if merge["runs_the_plain_layers"] else "NOT the same as"
    print(
        f"\nPEFT {peft['peft_version']} loads the adapter: largest logit difference "
        f"{peft['largest_logit_difference']:.1e} (largest logit {merge['largest_logit']:.1f})\n"
        f"merged (path {merge['path']}): largest logit difference "
        f"{merge['largest_logit_difference']:.1e}; its forward runs {merge['operators_merged']} "
        f"operators, {plain} the pretrained model's, and {merge['afa_operators_merged']} of "
        f"afa_kernels (unmerged: {merge['afa_operators_unmerged']})\n"
        f"checks {'passed' if passed else 'FAILED'}"
    )
    return passed


def results_table(runs: list[Run], python: str) -> str:
    rows = []
    for name, method in METHODS.items():
        own = [r for r in runs if r.method == name]
        mean = sum(r.accuracy for r in own) / len(own)
        seconds = sum(r.curve.seconds for r in own) / len(own)
        error = report.standard_error(mean, len(own[0].correct))
        rate = own[0].trained_examples / seconds
        rows.append(
            (
                method.title,
                f"{100 * mean:.1f} ± {100 * error:.1f}",
                f"{own[0].trainable_parameters:,}",
                f"{method.learning_rate:g}",
                f"{seconds:.1f}",
                f"{rate:.0f}",
            )
        )
    header = ("method", "test accuracy %", "trainable", "peak lr", "train s", "examples/s")
    tested = len(runs[0].correct)
    seeds = len(runs) // len(METHODS)
    note = f"Python {python}; {tested} test functions, ± one standard error; seeds: {seeds}"
    return f"{report.table(header, rows)}\n{note}"


def comparison(runs: list[Run]) -> str:
    """Return AFA-LoRA minus LoRA on the same test functions, with its paired standard error."""
    by_method = {
        name: torch.stack([r.correct for r in runs if r.method == name]).double().mean(0) for name in ("lora", "afa")
    }
    difference = by_method["afa"] - by_method["lora"]
    error = difference.std().item() / math.sqrt(len(difference))
    return (
        f"AFA-LoRA minus LoRA: {100 * difference.mean().item():+.1f} ± {100 * error:.1f} points "
        "(paired, one standard error)"
    )


def tune(names, path, splits, encoded, recipe, adapter, result, output: Path) -> int:
    """Print the grid and the best learning rates, and write them to tune.json."""
    # A seed that the comparison does not use.
    recipe = Recipe(**{**asdict(recipe), "seed": 1000})
    labels = len(splits.labels)
    rows = tuning.tune(names, path, labels, encoded["train"], encoded["validation"], recipe, adapter)
    best = tuning.best_rates(rows)
    for name, rate in best.items():
        print(f"{METHODS[name].title}: {rate:g} (in use: {METHODS[name].learning_rate:g})")
    report.write_json(output / "tune.json", result | {"recipe": asdict(recipe), "rows": rows, "best": best})
    return 0


if __name__ == "__main__":
    sys.exit(main())
