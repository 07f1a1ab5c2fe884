"""One cell of ``rl.py``: a method, a seed, a learning rate, trained by GRPO through TRL."""

import shutil
import time
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig
from examples.demo.report import write_json
from examples.demo.training import trainable_parameters
from experiments.harness import adaptation
from experiments.harness.adaptation import METHODS
from experiments.harness.rewards import REWARDS
from experiments.harness.rl_task import RLSettings, VerifiedAnswers
from experiments.harness.sft_training import Cell, agreement, finished

VALIDATION = "validation"  # its entry in the log of the trainer


class BarCallback(TrainerCallback):
    """A progress bar with the reward and alpha_t, in place of the trainer's own, which print every entry of the log."""

    def __init__(self, name: str, quiet: bool):
        self.name, self.quiet = name, quiet

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = self.quiet or not state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            disable=hidden,
            mininterval=1.0,
        )

    def on_step_end(self, args, state, control, **kwargs):
        last = next((entry for entry in reversed(state.log_history) if "reward" in entry), {})
        shown = {name: f"{last[name]:.2f}" for name in ("reward", "alpha_t") if name in last}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class ScoreCallback(TrainerCallback):
    """Notes the validation score in the log of the trainer, which its checkpoints keep."""

    def __init__(self, task: VerifiedAnswers, settings: RLSettings):
        self.task, self.settings = task, settings

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._note(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.settings.evaluate_every == 0 or state.global_step == state.max_steps:
            self._note(state, model)

    def _note(self, state, model) -> None:
        score = self.task.score(model, "validation", self.settings.curve_examples)[self.task.metric]
        state.log_history.append({"step": state.global_step, VALIDATION: score})


def run(cell: Cell, task: VerifiedAnswers, accelerator: Accelerator, quiet: bool = False, save_merged=False) -> dict:
    """Run ``cell``, or go on from its last checkpoint, or return its result if it is finished.

    Args:
        save_merged: write the adapter and the merged model to ``adapter/METHOD`` and ``merged/METHOD``.

    Raises:
        MergeMismatch: the merged model does not agree with the model with its adapter.
    """
    result = finished(cell, task)
    if result is not None:
        return result
    file = cell.file(task)
    checkpoints = file.with_suffix("")
    trained, progress = train(cell, task, accelerator, checkpoints, quiet)
    result = {
        "identity": cell.identity(task),
        "method": cell.method,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "score": task.score(trained, cell.part, cell.settings.test_examples),
        "trainable_parameters": trainable_parameters(trained) if METHODS[cell.method].trains != "head" else 0,
        "processes": accelerator.num_processes,
        "progress": progress,
    }
    if isinstance(trained, peft.PeftModel):
        folder = Path(cell.settings.output) if save_merged and accelerator.is_main_process else None
        result["merge"] = merge_check(trained, task, cell.method, folder, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(file, result)
        shutil.rmtree(checkpoints, ignore_errors=True)
    accelerator.wait_for_everyone()
    return result


def train(
    cell: Cell, task: VerifiedAnswers, accelerator: Accelerator, checkpoints: Path, quiet: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the trained model and what was measured along the way."""
    settings, method = cell.settings, METHODS[cell.method]
    model = task.model(cell.seed)
    if method.trains == "head":  # frozen: the policy before
        score = task.score(model, "validation", settings.curve_examples)[task.metric]
        return model, {"steps": [0], "scores": [score], "alpha_t": [], "loss": [], "cpu_seconds": 0.0, "seconds": 0.0}
    if method.trains != "adapters":
        adapter = adaptation.Adapter(settings.r, settings.lora_alpha, settings.target_modules)
        adaptation.adapt(model, method, adapter, None)
    problems = task.parts["train"]
    # The score of step n is at the alpha_t of step n: annealing comes first.
    callbacks: list[TrainerCallback] = [AnnealCallback(cell.annealing())] if method.activation is not None else []
    callbacks += [
        ScoreCallback(task, settings),
        BarCallback(f"{cell.method} s{cell.seed} {cell.learning_rate:g}", quiet),
    ]
    torch.manual_seed(cell.seed)  # of the adapters: the same in every method
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=REWARDS[settings.reward],
        args=configuration(cell, accelerator, checkpoints, quiet),
        train_dataset=Dataset.from_dict(
            {"prompt": [p.prompt for p in problems], "answer": [p.answer for p in problems]}
        ),
        processing_class=task.tokenizer,
        callbacks=callbacks,
        peft_config=peft_config(cell) if method.trains == "adapters" else None,
    )
    trainer.remove_callback(PrinterCallback if quiet else ProgressCallback)
    began, cpu_began = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    log = trainer.state.log_history
    scores = {entry["step"]: entry[VALIDATION] for entry in log if VALIDATION in entry}
    annealed = {entry["step"]: entry["alpha_t"] for entry in log if "alpha_t" in entry}
    progress = {
        "steps": list(scores),
        "scores": list(scores.values()),
        "reward": [entry["reward"] for entry in log if "reward" in entry],
        # That of the forward of each step: what was set after the step before.
        "alpha_t": [cell.annealing()(0), *annealed.values()][: settings.steps] if annealed else [],
        "loss": [entry["loss"] for entry in log if "loss" in entry],
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
    }
    return accelerator.unwrap_model(trainer.model), progress


def configuration(cell: Cell, accelerator: Accelerator, checkpoints: Path, quiet: bool) -> trl.GRPOConfig:
    """Return the arguments of TRL's trainer. The learning rate falls from where annealing ends, as in ``sft.py``."""
    settings = cell.settings
    decay = round((1 - settings.decay_from_frac) * settings.steps)
    return trl.GRPOConfig(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // accelerator.num_processes,
        num_generations=settings.completions,
        max_completion_length=settings.completion_length,
        temperature=settings.temperature,
        beta=settings.beta,
        learning_rate=cell.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": 0.0},
        warmup_steps=round(settings.warmup_frac * settings.steps),
        weight_decay=0.0,
        seed=cell.seed,
        bf16=settings.bf16,
        use_cpu=accelerator.device.type == "cpu",
        gradient_checkpointing=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=quiet,
    )


def peft_config(cell: Cell) -> peft.LoraConfig:
    """Return the configuration of LoRA, as PEFT has it, or of AFA-LoRA."""
    settings, activation = cell.settings, METHODS[cell.method].activation
    shared = {
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "target_modules": settings.target_modules,
    }
    return peft.LoraConfig(**shared) if activation is None else AFALoraConfig(**shared, activation=activation)


def merge_check(
    model: peft.PeftModel, task: VerifiedAnswers, name: str, folder: Path | None, accelerator: Accelerator
) -> dict[str, Any]:
    """Merge ``model`` in place and compare its logits with those before.

    Args:
        folder: where ``adapter/NAME`` and ``merged/NAME`` are written; the merged model is loaded again and compared
            too. None writes nothing.

    Raises:
        MergeMismatch: the largest difference is more than rounding makes.
    """

    def logits(of: nn.Module) -> torch.Tensor:
        with accelerator.autocast():
            return task.logits(of)

    before = logits(model)
    if folder is not None:
        model.save_pretrained(folder / "adapter" / name)
    merged = model.merge_and_unload()
    differences = {"merged": (logits(merged) - before).abs().max().item()}
    if folder is not None:
        task.save(merged, folder / "merged" / name)
        loaded = task.load(folder / "merged" / name).to(next(merged.parameters()).device)
        differences["loaded again"] = (logits(loaded) - before).abs().max().item()
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else next(merged.parameters()).dtype
    return agreement(name, before, differences, dtype)
