"""The task of ``rl.py``: prompts whose answers a program can check, and a policy that answers some of them."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.harness import operations, user_data
from experiments.harness.operations import Problem
from experiments.harness.rewards import REWARDS, exact
from experiments.harness.sft_config import Settings, _setting
from experiments.harness.sft_tasks import _device, _digest, _weights

POLICY_FOLDER = Path("outputs/policy")
_ANSWERED_AT_ONCE = 256


@dataclass(frozen=True)
class RLSettings(Settings):
    """Everything that a run of ``rl.py`` depends on; ``model`` is the policy, ``data`` has prompts and answers."""

    model: str | None = _setting(None, "policy: Hugging Face id or folder; default: the byte model of warm_up.py")
    data: str | None = _setting(None, "Hugging Face id or file; default: the operations on digits")
    text_column: str = _setting("prompt", "of --data")
    label_column: str = _setting("answer", "of --data")
    batch_size: int = _setting(128, "completions in a step, over all processes")
    completions: int = _setting(8, "of each prompt in a step: a group of GRPO")
    completion_length: int = _setting(4, "tokens at most")
    reward: str = _setting("exact", f"one of {', '.join(REWARDS)}")
    temperature: float = _setting(1.0, "of sampling")
    beta: float = _setting(0.0, "weight of the KL divergence from the policy before")
    output: str = _setting("outputs/rl", "folder of all results")

    def __post_init__(self):
        super().__post_init__()

        def expect(name: str, fits: bool, wanted: str) -> None:
            if not fits:
                raise ValueError(f"{name}: expected {wanted}, got {getattr(self, name)!r}")

        expect("task", self.task == "lm", "lm")
        expect("completions", self.completions >= 2, "at least 2: a group is compared with its mean")
        expect("batch_size", self.batch_size % self.completions == 0, f"a multiple of completions={self.completions}")
        expect("completion_length", self.completion_length >= 1, "at least 1")
        expect("reward", self.reward in REWARDS, f"one of {', '.join(REWARDS)}")
        expect("temperature", self.temperature > 0, "a positive number")
        expect("beta", self.beta >= 0, "0 or more")


class VerifiedAnswers:
    """A policy and problems in three parts; the score is the probability that a sampled answer is the right one.

    At temperature 1 that is the expected reward ``exact``, without the noise of sampling.
    """

    head = None
    metric = "probability of the right answer"
    higher_is_better = (metric, "greedy accuracy")

    def __init__(self, settings: RLSettings):
        self.settings = settings
        self.path = settings.model or POLICY_FOLDER
        if settings.model is None and not (self.path / "config.json").is_file():
            raise SystemExit(
                f"no model in {self.path}: run python -m experiments.warm_up operations first, or give --model"
            )
        self.tokenizer = AutoTokenizer.from_pretrained(self.path, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.parts = _own_problems(settings) if settings.data else operations.problems()

    def fingerprint(self) -> dict[str, Any]:
        return {"weights": _weights(self.path), "data": _digest(repr(self.parts).encode())}

    def model(self, seed: int) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)

    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        """Return the mean probability of the right answer, and the share of right answers in greedy decoding."""
        problems = self.parts[part]
        if limit is not None and limit < len(problems):
            problems = random.Random(0).sample(problems, limit)
        greedy = exact(self.answers(model, problems), [problem.answer for problem in problems])
        probability = self.probabilities(model, problems).mean().item()
        return {self.metric: probability, "greedy accuracy": sum(greedy) / len(greedy)}

    @torch.no_grad()
    def probabilities(self, model: nn.Module, problems: list[Problem]) -> Tensor:
        """Return the probability of each answer's own tokens and an end after them, ``(problems,)``."""
        training = model.training
        model.eval()
        result = []
        for start in range(0, len(problems), _ANSWERED_AT_ONCE):
            rows = operations.encoded(problems[start : start + _ANSWERED_AT_ONCE], self.tokenizer)
            tokens, mask, labels = (row.to(_device(model)) for row in rows)
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(
                logits.transpose(1, 2), labels[:, 1:], ignore_index=operations.IGNORED, reduction="none"
            )
            result.append((-losses.sum(1)).exp().cpu())
        model.train(training)
        return torch.cat(result)

    @torch.no_grad()
    def answers(self, model: nn.Module, problems: list[Problem]) -> list[str]:
        """Return what ``model`` answers to each problem in greedy decoding, without special tokens."""
        training = model.training
        model.eval()
        result = []
        for start in range(0, len(problems), _ANSWERED_AT_ONCE):
            prompts = [problem.prompt for problem in problems[start : start + _ANSWERED_AT_ONCE]]
            batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(_device(model))
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=self.settings.completion_length,
            )
            new = out[:, batch["input_ids"].shape[1] :]
            result += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        model.train(training)
        return result

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits of the last token of some test prompts, to compare models."""
        model.eval()
        batch = self.tokenizer([p.prompt for p in self.parts["test"][:64]], return_tensors="pt", padding=True)
        batch = batch.to(_device(model))
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return out.logits[:, -1].float().cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def _own_problems(settings: RLSettings) -> dict[str, list[Problem]]:
    columns = (settings.text_column, settings.label_column)
    rows = user_data.rows_of(settings.data, columns)
    return {part: [Problem(*(str(row[column]) for column in columns)) for row in own] for part, own in rows.items()}
