"""One training of a study, a *cell*: a method with a seed and a learning rate, by transformers' Trainer.

A finished cell is not run again; an interrupted one continues from its last checkpoint.
"""

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import afa_kernels as afa
from afa_kernels.callbacks import AnnealCallback
from examples.demo.report import write_json
from examples.demo.training import Recipe, trainable_parameters
from experiments.settings import METHODS, Method, Settings

TOLERANCE = 1e-4  # largest difference of logits, as a part of the largest logit, that rounding may make in a merge
VALIDATION = "validation"  # the part that chooses learning rates, and the entry of its score in the trainer's log
# Settings that say what is run or where, not what comes out of a cell.
_NOT_OF_A_CELL = {"methods", "seeds", "learning_rates", "grids", "tuning_seed", "tuning_seeds"}
_NOT_OF_A_CELL |= {"checkpoint_every", "output", "model"}


class Mismatch(RuntimeError):
    """A merged model computes something else than its adapter, or decoding gave another text than the target's."""


class Task:
    """A pretrained model and data: subclasses say what is learned and how it is scored."""

    head: str | None = None  # name of a new module that every method trains
    metric: str  # what is compared, a key of every score
    higher_is_better: tuple[str, ...] = ()  # the scores of which that is so
    path: str | Path
    data_digest: str

    def batch(self, size: int, seed: int, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, over all processes, without those before it."""
        raise NotImplementedError

    def collate(self, places: Sequence[int], cell: "Cell") -> dict[str, Tensor]:
        """Return what a process has of a step. Place ``step * batch_size`` begins a step."""
        size = cell.settings.batch_size
        batch = self.batch(size, cell.seed, places[0] // size)
        return {name: tensor[[place % size for place in places]] for name, tensor in batch.items()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        raise NotImplementedError

    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits of some test samples, to compare models."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        return {"weights": weights_digest(self.path), "data": self.data_digest}

    def model(self, seed: int) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

    def train(self, cell: "Cell", folder: Path, quiet: bool, callbacks: Sequence[TrainerCallback] = ()):
        """Return the trained model and the trainer's log; checkpoints are in ``folder``."""
        settings, model = cell.settings, self.model(cell.seed)
        torch.manual_seed(cell.seed)  # of the adapters: the same in every method
        cell.how.adapt(model, settings, self.head)
        head = set(model.get_submodule(self.head).parameters()) if self.head else set()
        body = [p for p in model.parameters() if p.requires_grad and p not in head]
        groups = [{"params": body, "lr": cell.rate}] if body else []
        if head:
            rate = settings.head_learning_rate if body else cell.rate
            groups.append({"params": [p for p in model.parameters() if p in head], "lr": rate})
        if not groups:
            return model, [{"step": 0, VALIDATION: self.score(model, VALIDATION, settings.curve_examples)[self.metric]}]
        recipe = Recipe(settings.steps, 0, 0, 0, 0, settings.warmup_frac, settings.decay_from_frac)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trainer = InOrder(
            model,
            TrainingArguments(**trainer_options(cell, folder, quiet), max_grad_norm=0.0),
            lambda places: self.collate(places, cell),
            self.loss,
            optimizer,
            recipe.learning_rate_factor,
        )
        return finish(trainer, self, cell, folder, callbacks)


class InOrder(Trainer):
    """Trains on batches in the order of their places, with a loss that is a function of model and batch."""

    def __init__(self, model, args, collate, loss, optimizer, factor: Callable[[int], float]):
        args._n_gpu = 1  # a process has one device, or DataParallel would take larger batches
        places = range(args.max_steps * args.per_device_train_batch_size * args.world_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        super().__init__(model, args, collate, places, optimizers=(optimizer, schedule))
        self.loss_of = loss

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss_of(model, inputs)


class Scores(TrainerCallback):
    """Notes the validation score in the log of the trainer, which its checkpoints keep."""

    def __init__(self, task: Task, settings: Settings):
        self.task, self.settings = task, settings

    def on_train_begin(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.note(state, model)

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.settings.evaluate_every == 0 or state.global_step == state.max_steps:
            self.note(state, model)

    def note(self, state, model) -> None:
        score = self.task.score(model, VALIDATION, self.settings.curve_examples)[self.task.metric]
        state.log_history.append({"step": state.global_step, VALIDATION: score})


class Bar(ProgressCallback):
    """A progress bar that does not print every entry of the log."""

    def on_log(self, *_, **__):
        pass


def trainer_options(cell: "Cell", folder: Path, quiet: bool) -> dict[str, Any]:
    """Return what the trainers of all studies have in common; batches are divided among the processes."""
    settings = cell.settings
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size // PartialState().num_processes,
        "learning_rate": cell.rate,
        "weight_decay": 0.0,
        "seed": cell.seed,
        "bf16": settings.bf16,
        "use_cpu": PartialState().device.type == "cpu",
        "save_steps": settings.checkpoint_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": quiet,
    }


def finish(trainer: Trainer, task: Task, cell: "Cell", folder: Path, callbacks: Sequence[TrainerCallback] = ()):
    """Train to the last step, from the last checkpoint in ``folder`` if there is one; return the model and the log."""
    # The score of step n is at the alpha_t of step n: annealing comes first.
    schedule = cell.how.annealing(cell.settings)
    own = [] if schedule is None else [AnnealCallback(schedule)]
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    for callback in (*own, Scores(task, cell.settings), *callbacks):
        trainer.add_callback(callback)
    if not trainer.args.disable_tqdm:
        print(f"{cell.method}, seed {cell.seed}, learning rate {cell.rate:g}", file=sys.stderr)
        trainer.add_callback(Bar())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return model, trainer.state.log_history


@dataclass(frozen=True)
class Cell:
    """One training; ``part`` is scored at its end, the validation part while learning rates are chosen."""

    method: str
    seed: int
    rate: float
    settings: Settings
    part: str = "test"
    how: Method | None = None  # METHODS[method] unless given

    def __post_init__(self):
        object.__setattr__(self, "how", self.how or METHODS[self.method])

    def folder(self, task: Task) -> Path:
        """Return the folder of the checkpoints and the result, named after all that the result depends on."""
        used = {name: value for name, value in asdict(self.settings).items() if name not in _NOT_OF_A_CELL}
        identity = used | {"how": asdict(self.how), "rate": self.rate, "part": self.part} | task.fingerprint()
        name = digest(json.dumps(identity, sort_keys=True).encode())
        return Path(self.settings.output) / "cells" / f"{self.method}-s{self.seed}-{name}"


def run(cell: Cell, task: Task, quiet: bool = False, save_merged: bool = False) -> dict[str, Any]:
    """Run ``cell``, or go on from its last checkpoint, or return its result if it is finished.

    Args:
        save_merged: write the adapter and the merged model to ``adapter/METHOD`` and ``merged/METHOD``.

    Raises:
        Mismatch: the merged model does not agree with the model with its adapter.
    """
    folder, process = cell.folder(task), PartialState()
    file = folder / "result.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    began = time.process_time()
    model, log = task.train(cell, folder, quiet)
    cpu_seconds = time.process_time() - began
    scores = {entry["step"]: entry[VALIDATION] for entry in log if VALIDATION in entry}
    # alpha_t of the forward of each step is what was set after the step before.
    alpha_t = [entry["alpha_t"] for entry in log if "alpha_t" in entry and "loss" in entry]
    result = {
        "method": cell.method,
        "seed": cell.seed,
        "learning_rate": cell.rate,
        "score": task.score(model, cell.part, cell.settings.test_examples),
        "trainable_parameters": trainable_parameters(model),
        "processes": process.num_processes,
        "progress": {
            "steps": list(scores),
            "scores": list(scores.values()),
            "cpu_seconds": cpu_seconds,
            "loss": [entry["loss"] for entry in log if "loss" in entry],
            "reward": [entry["reward"] for entry in log if "reward" in entry],
            "alpha_t": [cell.how.annealing(cell.settings)(0), *alpha_t[:-1]] if alpha_t else [],
        },
    }
    if has_adapters(model):
        saved = Path(cell.settings.output) if save_merged and process.is_main_process else None
        result["merge"] = merge_check(model, task, cell.method, saved)
    process.wait_for_everyone()
    if process.is_main_process:
        write_json(file, result)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    process.wait_for_everyone()
    return result


def merged(model: nn.Module) -> nn.Module:
    """Merge the adapters of ``model`` in place and return it without them."""
    if isinstance(model, PeftModel):
        return model.merge_and_unload()
    return afa.unload(afa.merge(model)) if has_adapters(model) else model


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, (PeftModel, afa.AFALinear)) for module in model.modules())


def merge_check(model: nn.Module, task: Task, name: str, folder: Path | None) -> dict[str, Any]:
    """Merge ``model`` in place and compare its logits with those before.

    Args:
        folder: where ``adapter/NAME`` and ``merged/NAME`` are written; the merged model is loaded again and compared
            too. None writes nothing.

    Raises:
        Mismatch: the largest difference is more than rounding makes.
    """
    before = task.logits(model)
    if folder is not None and isinstance(model, PeftModel):
        model.save_pretrained(folder / "adapter" / name)
    elif folder is not None:
        afa.save_adapter(model, folder / "adapter" / name)
    model = merged(model)
    differences = {"merged": (task.logits(model) - before).abs().max().item()}
    if folder is not None:
        task.save(model, folder / "merged" / name)
        loaded = task.load(folder / "merged" / name).to(device(model))
        differences["loaded again"] = (task.logits(loaded) - before).abs().max().item()
    largest = before.abs().max().item()
    for what, difference in differences.items():
        if not difference <= TOLERANCE * largest:  # also where it is not a number
            raise Mismatch(
                f"{name}: the logits of the {what} model are off by {difference:.2e} at most, the largest logit is "
                f"{largest:.2e}: more than rounding makes"
            )
    return {"largest_logit": largest, "largest_difference": differences}


def device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def digest(*pieces: bytes) -> str:
    return hashlib.sha256(b"".join((platform.python_version().encode(), *pieces))).hexdigest()[:16]


def weights_digest(path: str | Path) -> str:
    """Return what tells one set of weights from another: a digest of a folder's files, or the id."""
    pieces = []
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as stream:  # all of a large file would take long
            pieces += [str(file.stat().st_size).encode(), stream.read(2**20)]
    return digest(*pieces) if pieces else str(path)
