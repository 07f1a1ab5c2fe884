"""What annealing does to training: variants of AFA-LoRA on the tasks of ``sft.py``.

    python -m experiments.annealing                      every study
    python -m experiments.annealing schedules ranks      some of them

Settings and learning rates are those of ``experiments/configs/sft_lm.yaml`` but for what a study changes. Finished
cells are kept, those of ``sft.py`` too. Writes ``outputs/sft_lm/annealing.json`` and ``annealing.png``.

Some variants are blends that the package does not have, in plain torch. silu and gelu have slope 1/2 at 0, so a branch
of small z has half the gain of a LoRA at alpha_t = 1 and all of it at 0. And where z is small they are nearly linear.
These blends correct the gain, or let the activation see a larger z:

    phi(z) = (1 - alpha_t) z + alpha_t gain act(scale z) / scale
"""

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

import afa_kernels as afa
from examples.demo.report import environment, write_json
from experiments import results
from experiments.settings import METHODS, Method, Settings, parse
from experiments.sft import SFTSettings, make_task
from experiments.training import Cell, Task, run

CONFIG = Path(__file__).parent / "configs" / "sft_lm.yaml"
MEASURED = ("afa_relu", "afa_silu", "afa_gelu")
ACTIVATIONS = {"relu": functional.relu, "silu": functional.silu, "gelu": functional.gelu}


@dataclass(frozen=True)
class Prototype(Method):
    """An AFA-LoRA of another blend; with ``kept`` alpha_t stays 1, which no merge can follow."""

    gain: float = 1.0
    scale: float = 1.0
    kept: bool = False

    def adapt(self, model: nn.Module, settings: Settings, head: str | None = None) -> None:
        super().adapt(model, settings, head)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, afa.AFALinear):
                model.set_submodule(name, PrototypeLinear(layer, self))

    def annealing(self, settings: Settings) -> afa.AnnealSchedule | None:
        return None if self.kept else super().annealing(settings)

    def blend(self, z: Tensor, alpha_t: float) -> Tensor:
        if alpha_t == 0.0:
            return z
        bent = ACTIVATIONS[self.activation](self.scale * z) * (self.gain / self.scale)
        return (1.0 - alpha_t) * z + alpha_t * bent


PROTOTYPES = {
    "silu_gain": Prototype("silu, slope 1 at 0", "adapters", "silu", gain=2.0),
    "gelu_gain": Prototype("gelu, slope 1 at 0", "adapters", "gelu", gain=2.0),
    "silu_scale": Prototype("silu of 4 z", "adapters", "silu", scale=4.0),
    "silu_both": Prototype("silu of 4 z, slope 1 at 0", "adapters", "silu", gain=2.0, scale=4.0),
    "relu_kept": Prototype("relu, never annealed", "adapters", "relu", kept=True),
    "silu_kept": Prototype("silu, never annealed", "adapters", "silu", kept=True),
}


class PrototypeLinear(nn.Module):
    """An AFALinear with another blend; it takes over the layer's frozen base, A and B."""

    def __init__(self, layer: afa.AFALinear, method: Prototype):
        super().__init__()
        self.base_layer, self.lora_a, self.lora_b = layer.base_layer, layer.lora_a, layer.lora_b
        self.scaling, self.method, self.alpha_t = layer.scaling, method, 1.0

    def set_alpha_t(self, value: float) -> None:
        self.alpha_t = value

    def forward(self, x: Tensor) -> Tensor:
        h = self.method.blend(functional.linear(x, self.lora_a), self.alpha_t)
        return self.base_layer(x) + self.scaling * functional.linear(h, self.lora_b)


@dataclass(frozen=True)
class Variant:
    """One row of a study: a method with some settings changed, compared with the row ``against``."""

    label: str
    method: str = "afa_silu"
    changes: dict[str, Any] = field(default_factory=dict)
    against: str | None = None

    def cell(self, settings: Settings, seed: int) -> Cell:
        rates = settings.learning_rates
        rate = rates.get(self.method, rates["afa_silu"])
        return Cell(self.method, seed, rate, replace(settings, **self.changes), how=PROTOTYPES.get(self.method))


def pairs(label: str, value: Any, changes: dict[str, Any]) -> list[Variant]:
    """Return LoRA and AFA-LoRA with the same changes; ``label`` says where ``value`` stands."""
    name = label.format(value)
    return [Variant(f"LoRA, {name}", "lora", changes), Variant(f"silu, {name}", "afa_silu", changes, f"LoRA, {name}")]


def studies(settings: Settings) -> dict[str, list[Variant]]:
    lora = Variant("LoRA", "lora")
    made: dict[str, list[Variant]] = {"schedules": [lora, Variant("linear", against="LoRA")]}
    for kind in ("cosine", "exponential", "sigmoid", "constant"):
        made["schedules"].append(Variant(kind, changes={"schedule": kind}, against="linear"))
    # Where annealing ends, with a learning rate that falls from the warmup on or only from there.
    made["ends"] = [Variant(f"LoRA, decay from {f:.0%}", "lora", {"decay_from_frac": f}) for f in (0.1, 0.3, 0.6, 0.8)]
    for end in (0.3, 0.6, 0.8):
        for start in (end, 0.1):
            name, changes = f"decay from {start:.0%}", {"decay_from_frac": start, "anneal_end_frac": end}
            made["ends"].append(Variant(f"ends at {end:.0%}, {name}", "afa_silu", changes, f"LoRA, {name}"))
    made["blends"] = [lora, *(Variant(METHODS[m].activation, m, against="LoRA") for m in MEASURED)]
    made["kept"] = [lora]  # branches that stay non-linear: what is there to gain before annealing?
    for name, method in PROTOTYPES.items():
        if method.kept:
            annealed = Variant(f"{method.activation}, annealed", f"afa_{method.activation}", against="LoRA")
            made["kept"] += [annealed, Variant(method.title, name, against="LoRA")]
        else:
            made["blends"].append(Variant(method.title, name, against=method.activation))
    made["ranks"] = [v for r in (1, 2, 8) for v in pairs("r = {}", r, {"r": r, "lora_alpha": 2.0 * r})]
    made["longer"] = []
    for factor in (1, 3):  # evaluated as often
        steps, every = factor * settings.steps, factor * settings.evaluate_every
        made["longer"] += pairs("{} steps", steps, {"steps": steps, "evaluate_every": every})
    return made


def study(variants: list[Variant], settings: Settings, task: Task, seeds: int, quiet: bool) -> list[dict]:
    """Run the variants and return a row for each, with the paired difference to the row that it is compared with."""
    runs: dict[str, list[dict]] = {variant.label: [] for variant in variants}
    for seed in range(seeds):
        for variant in variants:
            runs[variant.label].append(run(variant.cell(settings, seed), task, quiet))
    scores = {label: [r["score"][task.metric] for r in own] for label, own in runs.items()}
    rows = []
    for variant in variants:
        values, base = scores[variant.label], scores.get(variant.against, [])
        row = {"label": variant.label, "against": variant.against, "scores": values, "seeds": seeds}
        row |= {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1)) if seeds > 1 else None}
        row["cpu_seconds"] = runs[variant.label][-1]["progress"]["cpu_seconds"]
        if base:
            row["differences"] = [a - b for a, b in zip(values, base, strict=True)]
            row["difference"] = float(np.mean(row["differences"]))
        if base and seeds > 1:
            row["difference_interval"] = results.interval(lambda a, b: a - b, values, base)
        rows.append(row)
    if any(label.startswith("ends at") for label in runs):
        draw(variants, runs, Path(settings.output) / "annealing.png")
    return rows


def draw(variants: list[Variant], runs: dict[str, list[dict]], file: Path) -> None:
    """Draw the training loss minus that of LoRA on the same batches, where the learning rate falls from 10% on."""
    curves = {}
    for variant in variants:
        if variant.against == "LoRA, decay from 10%":
            losses = [np.array([r["progress"]["loss"] for r in runs[n]]) for n in (variant.label, variant.against)]
            curves[variant.label] = ((losses[0] - losses[1]).mean(0), runs[variant.label][0]["progress"]["alpha_t"])
    results.draw_differences(curves, file)


def table(rows: list[dict], metric: str) -> str:
    lines = []
    for row in rows:
        line = [row["label"], results.with_spread(row), row["against"] or ""]
        line.append(results.with_interval(row, "difference", "{:+.4f}"))
        line.append(f"{sum(d < 0 for d in row['differences'])}/{row['seeds']}" if "differences" in row else "")
        lines.append(line)
    return results.markdown(("variant", metric, "compared with", "difference", "seeds better"), lines)


class Inputs(TrainerCallback):
    """Measures, along the annealing, how large z is and how much of act(z) no linear map of z can replace."""

    def __init__(self, cell: Cell, task: Task):
        self.cell, self.task, self.rows = cell, task, []
        self.end = int(cell.settings.anneal_end_frac * cell.settings.steps)

    def on_train_begin(self, args, state, control, model=None, **_):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step > self.end or state.global_step % max(1, self.end // 4):
            return
        layers = [m for m in model.modules() if isinstance(m, afa.AFALinear)]
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda layer, x: seen.append(functional.linear(x[0].flatten(0, -2), layer.lora_a).detach())
            )
            for layer in layers
        ]
        self.task.logits(model)
        model.train()
        for hook in hooks:
            hook.remove()
        row = {"method": self.cell.method, "seed": self.cell.seed, "step": state.global_step}
        row["alpha_t"] = layers[0].alpha_t
        sizes = [z.abs().mean().item() for z in seen]
        shares = [share_of_nonlinearity(z, self.cell.how.activation) for z in seen]
        for name, values in (("size", sizes), ("share", shares)):
            row |= {name: float(np.mean(values)), f"{name}_range": [min(values), max(values)]}
        self.rows.append(row)


def share_of_nonlinearity(z: Tensor, activation: str) -> float:
    """Return ``||act(z) - z M|| / ||act(z)||`` with the best linear map M: 0 is what a LoRA can do too.

    ``z`` is ``(rows, r)``; the norms are over all elements.
    """
    z = z.double()
    bent = ACTIVATIONS[activation](z)
    rest = bent - z @ torch.linalg.lstsq(z, bent).solution
    return (rest.norm() / bent.norm()).item()


def inputs(settings: Settings, task: Task, seeds: int, quiet: bool) -> list[dict]:
    rows = []
    for method in MEASURED:
        for seed in range(seeds):
            cell = Cell(method, seed, settings.learning_rates[method], settings)
            measured = Inputs(cell, task)
            with TemporaryDirectory() as folder:  # of checkpoints: what is measured is not in them
                task.train(cell, Path(folder), quiet, [measured])
            rows += measured.rows
    return rows


def inputs_table(rows: list[dict]) -> str:
    """Return means over layers and seeds; in brackets the smallest and largest layer."""
    lines = []
    for method, step in dict.fromkeys((row["method"], row["step"]) for row in rows):
        own = [row for row in rows if row["method"] == method and row["step"] == step]
        line = [METHODS[method].title, str(step), f"{own[0]['alpha_t']:.2f}"]
        for name, form in (("size", "{:.2f}"), ("share", "{:.1%}")):
            ends = min(row[f"{name}_range"][0] for row in own), max(row[f"{name}_range"][1] for row in own)
            line.append(" [".join(map(form.format, (np.mean([row[name] for row in own]), ends[0]))))
            line[-1] += f", {form.format(ends[1])}]"
        lines.append(line)
    return results.markdown(("method", "step", "alpha_t", "mean abs z", "act(z) beyond a linear map"), lines)


def main(argv: list[str] | None = None) -> int:
    names = [*studies(Settings()), "inputs"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (3)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    chosen = parser.parse_args(argv)
    unknown = sorted(set(chosen.studies) - set(names))
    if unknown:
        parser.error(f"studies: expected some of {', '.join(names)}, got {unknown[0]}")
    PartialState(cpu=not torch.cuda.is_available())
    settings, _, _ = parse(SFTSettings, ["--config", chosen.config], __doc__)
    task = make_task(settings)
    file = Path(settings.output) / "annealing.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"studies": {}}
    for name in chosen.studies or names:
        if name == "inputs":
            rows = inputs(settings, task, chosen.seeds, chosen.quiet)
        else:
            rows = study(studies(settings)[name], settings, task, chosen.seeds, chosen.quiet)
        print(f"\n{name}\n\n{inputs_table(rows) if name == 'inputs' else table(rows, task.metric)}", flush=True)
        result["studies"][name] = rows
        write_json(file, {"environment": environment(), "settings": vars(settings)} | result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
