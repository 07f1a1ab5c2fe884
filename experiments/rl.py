"""Compare LoRA, AFA-LoRA and full fine-tuning in reinforcement learning: GRPO with a reward that a program verifies.

    python -m experiments.pretrain draft policy                                    the policy before
    python -m experiments.rl --config experiments/configs/rl.yaml
    python -m experiments.rl --config experiments/configs/rl.yaml --tune           choose the learning rates
    torchrun --nproc-per-node 2 -m experiments.rl --config experiments/configs/rl.yaml

A prompt is ``7#4=``, the answer the result of the operation that the sign stands for. The policy knows four operations
on digits, but not which of them a sign means: it guesses. The reward is 1 for the right result. Training is TRL's
``GRPOTrainer``; LoRA is PEFT's own.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback

from afa_kernels.peft import AFALoraConfig
from experiments import data
from experiments.comparison import command
from experiments.settings import Settings, setting
from experiments.training import Cell, Task, device, digest, finish, trainer_options

POLICY = Path("outputs/policy")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "#": lambda a, b: a + b,
    "@": lambda a, b: abs(a - b),
    "&": max,
    "~": min,
}
HELD_OUT = {"validation": 0.2, "test": 0.3}  # of the pairs of numbers; each sign is asked with every pair
AT_ONCE = 256  # problems in a forward
IGNORED = -100  # label of a token that has no loss


@dataclass
class RLSettings(Settings):
    """``model`` is the policy, ``data`` has the columns ``prompt`` and ``answer``."""

    text_column: str = setting("prompt", "of --data")
    label_column: str = setting("answer", "of --data")
    batch_size: int = setting(128, "completions in a step, over all processes")
    completions: int = setting(8, "of each prompt in a step: a group of GRPO")
    completion_length: int = setting(4, "tokens at most")
    temperature: float = setting(1.0, "of sampling")
    beta: float = setting(0.0, "weight of the KL divergence from the policy before")
    output: str = setting("outputs/rl", "folder of all results")

    def __post_init__(self):
        super().__post_init__()
        fits = self.completions >= 2 and self.batch_size % self.completions == 0
        self.expect("completions", fits, f"2 or more that divide batch_size={self.batch_size}")


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


def problems(seed: int = 0) -> dict[str, list[Problem]]:
    """Return the problems of ``train``, ``validation`` and ``test``, split by the pair of numbers."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(seed).shuffle(pairs)
    result = {}
    for part, share in HELD_OUT.items():
        count = round(share * 100)
        result[part], pairs = _asked(pairs[:count]), pairs[count:]
    return {"train": _asked(pairs), **result}


def _asked(pairs: list[tuple[int, int]]) -> list[Problem]:
    return [Problem(f"{a}{sign}{b}=", str(operation(a, b))) for a, b in pairs for sign, operation in OPERATIONS.items()]


def without_meaning(count: int, generator: random.Random) -> list[Problem]:
    """Return random prompts, all pairs among them, with the results of random operations."""
    signs, operations = list(OPERATIONS), list(OPERATIONS.values())
    result = []
    for _ in range(count):
        a, b = generator.choice(range(10)), generator.choice(range(10))
        result.append(Problem(f"{a}{generator.choice(signs)}{b}=", str(generator.choice(operations)(a, b))))
    return result


def encoded(problems: Sequence[Problem], tokenizer) -> dict[str, Tensor]:
    """Return tokens, attention mask and labels, ``(problems, longest)`` each: the answer and an end are labelled."""
    tokens, labels = [], []
    for problem in problems:
        prompt = tokenizer(problem.prompt)["input_ids"]
        answer = [*tokenizer(problem.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        tokens.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer))

    def pad(values: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)

    mask = pad([torch.ones_like(row) for row in tokens], 0)
    return {"input_ids": pad(tokens, 0), "attention_mask": mask, "labels": pad(labels, IGNORED)}


def exact(completions: Sequence[str], answer: Sequence[str], **_) -> list[float]:
    """Return 1 for a completion that is the answer and nothing else, else 0: a reward as TRL calls it."""
    return [float(completion == wanted) for completion, wanted in zip(completions, answer, strict=True)]


class VerifiedAnswers(Task):
    """A policy and problems; the score is the probability that a sampled answer is the right one.

    At temperature 1 that is the expected reward, without the noise of sampling.
    """

    metric = "probability of the right answer"
    higher_is_better = (metric, "greedy accuracy")

    def __init__(self, settings: RLSettings):
        self.settings = settings
        self.path = settings.model or data.existing(POLICY)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.parts = problems()
        if settings.data:
            columns = (settings.text_column, settings.label_column)
            rows = data.rows_of(settings.data, columns)
            self.parts = {part: [Problem(*(str(row[c]) for c in columns)) for row in own] for part, own in rows.items()}
        self.data_digest = digest(repr(self.parts).encode())

    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        """Return the mean probability of the right answer, and the share of right answers in greedy decoding."""
        asked, training = self.parts[part], model.training
        if limit is not None and limit < len(asked):
            asked = random.Random(0).sample(asked, limit)
        model.eval()
        probabilities, greedy = [], []
        for own in (asked[start : start + AT_ONCE] for start in range(0, len(asked), AT_ONCE)):
            probabilities.append(self.probabilities(model, own))
            greedy += exact(self.answers(model, own), [problem.answer for problem in own])
        model.train(training)
        return {self.metric: torch.cat(probabilities).mean().item(), "greedy accuracy": sum(greedy) / len(greedy)}

    @torch.no_grad()
    def probabilities(self, model: nn.Module, asked: list[Problem]) -> Tensor:
        """Return the probability of each answer's own tokens and an end after them, ``(problems,)``."""
        batch = {name: rows.to(device(model)) for name, rows in encoded(asked, self.tokenizer).items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        return (-losses.sum(1)).exp().cpu()

    @torch.no_grad()
    def answers(self, model: nn.Module, asked: list[Problem]) -> list[str]:
        """Return what ``model`` answers to each problem in greedy decoding, without special tokens."""
        batch = self._prompts(asked, model)
        out = model.generate(**batch, do_sample=False, max_new_tokens=self.settings.completion_length)
        return self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        batch = self._prompts(self.parts["test"][:64], model)
        return model.eval()(**batch, use_cache=False).logits[:, -1].float().cpu()

    def _prompts(self, asked: list[Problem], model: nn.Module) -> dict[str, Tensor]:
        batch = self.tokenizer([p.prompt for p in asked], return_tensors="pt", padding=True).to(device(model))
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def train(self, cell: Cell, folder: Path, quiet: bool, callbacks: Sequence[TrainerCallback] = ()):
        if cell.how.trains == "head":  # the policy before
            return super().train(cell, folder, quiet)
        model, settings = self.model(cell.seed), cell.settings
        if cell.how.trains != "adapters":
            cell.how.adapt(model, settings)
        torch.manual_seed(cell.seed)  # of the adapters: the same in every method
        asked = self.parts["train"]
        trainer = trl.GRPOTrainer(
            model,
            reward_funcs=exact,
            args=grpo_config(cell, folder, quiet),
            train_dataset=Dataset.from_dict({"prompt": [p.prompt for p in asked], "answer": [p.answer for p in asked]}),
            processing_class=self.tokenizer,
            peft_config=peft_config(cell) if cell.how.trains == "adapters" else None,
        )
        return finish(trainer, self, cell, folder, callbacks)


def grpo_config(cell: Cell, folder: Path, quiet: bool) -> trl.GRPOConfig:
    """Return the arguments of TRL's trainer. The learning rate falls from where annealing ends, as in ``sft.py``."""
    settings = cell.settings
    decay = round((1 - settings.decay_from_frac) * settings.steps)
    return trl.GRPOConfig(
        **trainer_options(cell, folder, quiet),
        num_generations=settings.completions,
        max_completion_length=settings.completion_length,
        temperature=settings.temperature,
        beta=settings.beta,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": 0.0},
        warmup_steps=round(settings.warmup_frac * settings.steps),
        gradient_checkpointing=False,
    )


def peft_config(cell: Cell) -> peft.LoraConfig:
    """Return the configuration of LoRA, as PEFT has it, or of AFA-LoRA."""
    settings, activation = cell.settings, cell.how.activation
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": settings.r, "lora_alpha": settings.lora_alpha}
    shared["target_modules"] = settings.target_modules
    return peft.LoraConfig(**shared) if activation is None else AFALoraConfig(**shared, activation=activation)


def main(argv: list[str] | None = None) -> int:
    return command("rl", argv, __doc__, RLSettings, VerifiedAnswers)


if __name__ == "__main__":
    sys.exit(main())
