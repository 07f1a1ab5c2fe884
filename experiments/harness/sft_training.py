"""One fine-tuning: a method, a seed, a learning rate. It can stop anywhere and goes on bit by bit."""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

import afa_kernels as afa
from examples.demo.classifier import Batch
from examples.demo.report import write_json
from examples.demo.training import Recipe, trainable_parameters
from experiments.harness import adaptation, prototypes
from experiments.harness.sft_config import Settings
from experiments.harness.sft_tasks import Task

# Largest difference of logits, as a part of the largest logit, that rounding may make in a merge.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Settings that say what is run or where, not what comes out of one fine-tuning.
_NOT_OF_A_CELL = (
    "methods",
    "seeds",
    "learning_rates",
    "grids",
    "tuning_seed",
    "tuning_seeds",
    "checkpoint_every",
    "output",
    "model",
)
_OF_ANNEALING = ("schedule", "schedule_options", "anneal_end_frac")
_OF_ADAPTERS = ("r", "lora_alpha")


METHODS = adaptation.METHODS | prototypes.PROTOTYPES


class MergeMismatch(RuntimeError):
    """A merged model computes something else than the model with its adapter."""


@dataclass(frozen=True)
class Cell:
    """One fine-tuning of the comparison."""

    method: str
    seed: int
    learning_rate: float
    settings: Settings
    part: str = "test"  # scored at the end: validation while learning rates are chosen

    def identity(self, task: Task) -> dict[str, Any]:
        """Return all that its result depends on."""
        settings = self.settings.as_dict()
        method = METHODS[self.method]
        unused = list(_NOT_OF_A_CELL)
        if method.activation is None:
            unused += _OF_ANNEALING
        if method.trains != "adapters":
            unused += _OF_ADAPTERS
        if method.trains == "head":
            unused.append("head_learning_rate")
        used = {name: value for name, value in settings.items() if name not in unused and value is not None}
        definition = {name: value for name, value in asdict(method).items() if name != "title"}
        own = {"method": definition, "seed": self.seed, "learning_rate": self.learning_rate, "part": self.part}
        return own | task.fingerprint() | used

    def file(self, task: Task) -> Path:
        digest = hashlib.sha256(json.dumps(self.identity(task), sort_keys=True).encode()).hexdigest()
        return Path(self.settings.output) / "cells" / f"{self.method}-s{self.seed}-{digest[:12]}.json"

    def recipe(self) -> Recipe:
        s = self.settings
        return Recipe(
            s.steps, s.batch_size, s.evaluate_every, s.curve_examples, self.seed, s.warmup_frac, s.decay_from_frac
        )

    def annealing(self) -> afa.AnnealSchedule | None:
        if METHODS[self.method].activation is None:
            return None
        s = self.settings
        return afa.AnnealSchedule(s.steps, s.schedule, end_frac=s.anneal_end_frac, **s.schedule_options)


@dataclass
class Progress:
    """What was measured along the way; ``alpha_t`` is that of the forward of each step."""

    steps: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    alpha_t: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0  # of this process, evaluation of the curve included
    seconds: float = 0.0


class Run:
    """A cell in progress: model, optimizer, schedules and what was measured."""

    def __init__(self, cell: Cell, task: Task, accelerator: Accelerator):
        self.cell, self.task, self.accelerator = cell, task, accelerator
        settings = cell.settings
        method = METHODS[cell.method]
        self.plain = task.model(cell.seed)
        torch.manual_seed(cell.seed)  # of the adapters: the same in every method
        adapter = adaptation.Adapter(settings.r, settings.lora_alpha, settings.target_modules)
        self.adapted = adaptation.adapt(self.plain, method, adapter, task.head)
        if isinstance(method, prototypes.Prototype):
            prototypes.use_prototype(self.plain, method)
        if settings.bf16:
            adaptation.freeze_in_bfloat16(self.plain)
        self.plain.to(accelerator.device)
        head_rate = cell.learning_rate if method.trains == "head" else settings.head_learning_rate
        groups = adaptation.parameter_groups(self.plain, task.head, cell.learning_rate, head_rate)
        self.progress = Progress()
        self.step = 0
        self.schedule = cell.annealing()
        if self.schedule is not None:
            self.schedule.attach(self.plain)
        self.model: nn.Module = self.plain
        self.optimizer = None
        if groups:  # a frozen model without a new head has nothing to train
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            self.learning_rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, cell.recipe().learning_rate_factor)
            self.model = accelerator.prepare(self.plain)

    def train(self, checkpoint: Path, quiet: bool = False) -> None:
        """Train to the last step, with a progress bar, saving ``checkpoint`` along the way."""
        settings = self.cell.settings
        steps = settings.steps if self.optimizer is not None else 0
        if checkpoint.is_file():
            self.load(checkpoint)
        name = f"{self.cell.method} s{self.cell.seed} {self.cell.learning_rate:g}"
        hidden = quiet or not self.accelerator.is_main_process
        bar = tqdm(total=steps, initial=self.step, desc=f"{name:<22}", unit="step", disable=hidden, mininterval=1.0)
        self.model.train()
        while self.step < steps:
            began, cpu_began = time.perf_counter(), time.process_time()
            if self.step % settings.evaluate_every == 0:
                self.note_score()
            self.one_step()
            self.progress.seconds += time.perf_counter() - began
            self.progress.cpu_seconds += time.process_time() - cpu_began
            if self.step % settings.checkpoint_every == 0 and self.step < steps:
                self.save(checkpoint)
            shown = {"loss": f"{self.progress.loss[-1]:.3f}", "alpha_t": f"{self.progress.alpha_t[-1]:.2f}"}
            bar.set_postfix(shown, refresh=False)
            bar.update()
        self.note_score()
        bar.close()

    def one_step(self) -> None:
        cell, accelerator = self.cell, self.accelerator
        batch = self.task.batch(cell.settings.batch_size, cell.seed, self.step)
        with accelerator.autocast():
            loss = self.task.loss(self.model, _share(batch, accelerator))
        self.progress.alpha_t.append(0.0 if self.schedule is None else self.schedule.alpha_t)
        self.optimizer.zero_grad()
        accelerator.backward(loss)
        self.optimizer.step()
        self.learning_rate.step()
        if self.schedule is not None:
            self.schedule.step()
        self.progress.loss.append(accelerator.reduce(loss.detach(), reduction="mean").item())
        self.step += 1

    def note_score(self) -> None:
        self.progress.steps.append(self.step)
        score = self.score("validation", self.cell.settings.curve_examples)
        self.progress.scores.append(score[self.task.metric])

    def score(self, part: str, limit: int | None = None) -> dict[str, float]:
        with self.accelerator.autocast():
            return self.task.score(self.plain, part, limit)

    def save(self, file: Path) -> None:
        """Write what is needed to go on, in one atomic replacement."""
        if not self.accelerator.is_main_process:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "trained": {name: p.detach() for name, p in self.plain.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "progress": asdict(self.progress),
        }
        temporary = file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, file)

    def load(self, file: Path) -> None:
        state = torch.load(file, map_location="cpu", weights_only=True)
        parameters = dict(self.plain.named_parameters())
        with torch.no_grad():
            for name, value in state["trained"].items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        self.progress = Progress(**state["progress"])
        self.step = state["step"]


def finished(cell: Cell, task: Task) -> dict | None:
    """Return the stored result of ``cell``, or None if it was not run yet."""
    file = cell.file(task)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run(cell: Cell, task: Task, accelerator: Accelerator, quiet: bool = False, save_merged: bool = False) -> dict:
    """Run ``cell``, or go on with it, or return its result if it is finished.

    Args:
        save_merged: write the adapter and the merged model to ``adapter/METHOD`` and ``merged/METHOD``.

    Raises:
        MergeMismatch: the merged model does not agree with the model with its adapter.
    """
    file = cell.file(task)
    result = finished(cell, task)
    if result is not None:
        return result
    checkpoint = file.with_suffix(".checkpoint")
    run = Run(cell, task, accelerator)
    run.train(checkpoint, quiet)
    accelerator.wait_for_everyone()
    tail = run.progress.loss[-max(1, len(run.progress.loss) // 10) :]
    result = {
        "identity": cell.identity(task),
        "method": cell.method,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "score": run.score(cell.part, cell.settings.test_examples),
        "training_loss_of_the_last_tenth": sum(tail) / len(tail) if tail else None,
        "trainable_parameters": trainable_parameters(run.plain),
        "processes": accelerator.num_processes,
        "progress": asdict(run.progress),
    }
    if any(isinstance(m, afa.AFALinear) for m in run.plain.modules()):
        folder = Path(cell.settings.output) if save_merged else None
        result["merge"] = merge_check(run.plain, task, cell.method, folder, accelerator)
    if accelerator.is_main_process:
        write_json(file, result)
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return result


def merge_check(
    model: nn.Module, task: Task, name: str, folder: Path | None, accelerator: Accelerator
) -> dict[str, Any]:
    """Merge ``model`` in place, take its AFA layers out, and compare its logits with those before.

    Args:
        folder: where ``adapter/NAME`` and ``merged/NAME`` are written; the merged model is loaded again and compared
            too. None writes nothing.

    Raises:
        MergeMismatch: the largest difference is more than rounding makes.
    """
    dtype = next(m for m in model.modules() if isinstance(m, afa.AFALinear)).weight.dtype
    writes = folder is not None and accelerator.is_main_process

    def logits(of: nn.Module) -> torch.Tensor:
        with accelerator.autocast():
            return task.logits(of)

    before = logits(model)
    if writes:
        afa.save_adapter(model, folder / "adapter" / name)
    afa.merge(model)
    afa.unload(model)
    differences = {"merged": (logits(model) - before).abs().max().item()}
    if writes:
        task.save(model, folder / "merged" / name)
        loaded = task.load(folder / "merged" / name).to(next(model.parameters()).device)
        differences["loaded again"] = (logits(loaded) - before).abs().max().item()
    return agreement(name, before, differences, dtype)


def agreement(name: str, before: torch.Tensor, differences: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """Return the largest differences to the logits ``before``, by what was compared.

    Raises:
        MergeMismatch: one is more than rounding in ``dtype`` makes.
    """
    largest = before.abs().max().item()
    for what, difference in differences.items():
        if not difference <= TOLERANCE[dtype] * largest:  # also where it is not a number
            raise MergeMismatch(
                f"{name}: the logits of the {what} model are off by {difference:.2e} at most, the largest logit is "
                f"{largest:.2e}: more than rounding makes"
            )
    return {"largest_logit": largest, "largest_difference": differences}


def _share(batch: Any, accelerator: Accelerator) -> Any:
    """Return this process' samples of a batch that all processes made alike."""
    world, rank = accelerator.num_processes, accelerator.process_index
    if world == 1:
        return batch
    if isinstance(batch, Batch):
        return Batch(*(t[rank::world] for t in (batch.input_ids, batch.attention_mask, batch.labels)))
    return batch[rank::world]
