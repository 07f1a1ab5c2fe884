"""Compare ways to fine-tune a pretrained model: LoRA, AFA-LoRA, full fine-tuning.

    python -m experiments.sft --config experiments/configs/sft_lm.yaml
    python -m experiments.sft --config experiments/configs/sft_classification.yaml
    python -m experiments.sft --config experiments/configs/sft_lm.yaml --tune    choose the learning rates
    torchrun --nproc-per-node 2 -m experiments.sft --config experiments/configs/sft_lm.yaml

A merged model that does not agree with its adapter ends the command with exit code 1.
"""

import random
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from examples.demo import data as functions
from examples.demo.classifier import Batch, Classifier, Encoded, packaged_model
from examples.demo.data import Example
from experiments import data
from experiments.comparison import command
from experiments.settings import Settings, setting
from experiments.training import Task, device, digest

SOURCE_MODEL = Path("outputs/source")
# The words of which one is hidden.
WORDS = "False None True and as def else for from if in is isinstance len not or raise return try with".split()
LEFT_OUT = {"test", "site-packages", "pydoc_data", "idlelib", "lib2to3", "turtledemo", "__phello__"}
LARGEST_SHARE = 2.0  # of a label, over an equal share


@dataclass
class SFTSettings(Settings):
    task: Literal["lm", "classification"] = setting("lm", "next-token prediction, or classification with a new head")
    keep_layers: int | None = setting(None, "only the first layers of an encoder, for classification; default: all")
    head_learning_rate: float = setting(1e-2, "of a new head, in every method that trains more")
    output: str = setting("outputs/sft", "folder of all results")


def make_task(settings: SFTSettings) -> Task:
    return (LanguageModelling if settings.task == "lm" else Classification)(settings)


class LanguageModelling(Task):
    """A causal language model; the score is the mean loss of the next token."""

    def __init__(self, settings: Settings, path: str | Path | None = None):
        self.path = path or settings.model or data.existing(SOURCE_MODEL)
        self.length = settings.length
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        if settings.data:
            parts = data.rows_of(settings.data, (settings.text_column,))
            texts = {part: "\n".join(str(row[settings.text_column]) for row in rows) for part, rows in parts.items()}
        else:
            texts = data.topic_texts()
        bytewise = isinstance(self.tokenizer, type(data.tokenizer()))
        self.metric = "nats per byte" if bytewise else "nats per token"
        self.parts = {part: data.encode(text) if bytewise else self._tokens(text) for part, text in texts.items()}
        for part, ids in self.parts.items():
            if len(ids) < self.length:
                raise ValueError(f"data: expected at least {self.length} tokens to {part}, got {len(ids)}")
        self.data_digest = digest(*(ids.numpy().tobytes() for ids in self.parts.values()))

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def batch(self, size: int, seed: int, step: int) -> dict[str, Tensor]:
        return {"input_ids": data.batch(self.parts["train"], size, self.length, seed, step)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return data.loss(model, batch["input_ids"])

    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        return {self.metric: data.nats_per_token(model, self.parts[part], self.length, limit)}

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        rows = next(data.windows(self.parts["test"], self.length, limit=8))
        return model.eval()(input_ids=rows.to(device(model)), use_cache=False).logits.float().cpu()


class Classification(Task):
    """An encoder and a new linear head; the score is the cross-entropy, accuracy stands beside it."""

    head = "head"
    metric = "nats per label"
    higher_is_better = ("accuracy",)

    def __init__(self, settings: SFTSettings):
        self.path = settings.model or packaged_model()
        self.keep_layers = settings.keep_layers
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        if settings.data:
            columns = (settings.text_column, settings.label_column)
            rows = data.rows_of(settings.data, columns)
            examples = {
                part: [Example(*(str(row[column]) for column in columns), ("", "")) for row in own]
                for part, own in rows.items()
            }
        else:
            examples = hidden_words(self.tokenizer.mask_token or "_")
        self.labels = sorted({e.label for own in examples.values() for e in own})
        self.parts = {part: Encoded(own, self.labels, self.path, settings.length) for part, own in examples.items()}
        self.data_digest = digest(*(f"{e.label}:{e.text}".encode() for own in examples.values() for e in own))

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)  # of the head
        model = Classifier(self.path, len(self.labels))
        if self.keep_layers is not None:
            model.keep_layers(self.keep_layers)
        return model

    def batch(self, size: int, seed: int, step: int) -> dict[str, Tensor]:
        """Return random examples; none is repeated before all were used."""
        return vars(self.parts["train"].training_batch(size, seed, step))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"])
        return nn.functional.cross_entropy(logits.float(), batch["labels"])

    @torch.no_grad()
    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        training, total, right, count = model.training, 0.0, 0, 0
        model.eval()
        for batch in self.parts[part].evaluation_batches(limit=limit):
            logits = self._logits(model, batch)
            total += nn.functional.cross_entropy(logits, batch.labels, reduction="sum").item()
            right += (logits.argmax(1) == batch.labels).sum().item()
            count += len(batch)
        model.train(training)
        return {self.metric: total / count, "accuracy": right / count}

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        batches = self.parts["test"].evaluation_batches(limit=64)
        return torch.cat([self._logits(model.eval(), batch) for batch in batches])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        on = device(model)
        return model(batch.input_ids.to(on), batch.attention_mask.to(on)).float().cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the encoder as transformers loads it, and the head beside it."""
        super().save(model.encoder, folder)
        save_file(model.head.state_dict(), folder / "head.safetensors", metadata={"labels": ",".join(self.labels)})

    def load(self, folder: Path) -> nn.Module:
        model = Classifier(folder, len(self.labels))
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
        return model


def hidden_words(mask: str, seed: int = 0) -> dict[str, list[Example]]:
    """Return functions of the standard library with one word replaced by ``mask``, and that word as the label.

    A sentence encoder's mean vector says what a text is about, hardly which word is missing, so a frozen encoder does
    badly here and fine-tuning has something to learn. Whole definitions are held out; each function occurs once.
    """
    root = functions.standard_library()
    names = {p.stem for p in root.glob("*.py")} | {p.parent.name for p in root.glob("*/__init__.py")}
    splits = functions.load(sorted(names - LEFT_OUT), seed=seed)
    return {part: hide(getattr(splits, part), mask, seed) for part in data.PARTS}


def hide(examples: Sequence[Example], mask: str, seed: int) -> list[Example]:
    """Return each example that has one of ``WORDS`` after its first, with one of them hidden.

    The rarest word so far is taken, and frequent ones are dropped beyond ``LARGEST_SHARE``: no label is much more
    likely than another.
    """
    generator, counts, made = random.Random(seed), defaultdict(int), []
    for example in examples:
        found = [m for m in re.finditer(r"\w+", example.text) if m[0] in WORDS and m.start() > 0]
        if not found:
            continue
        rarest = min(counts[m[0]] for m in found)
        chosen = generator.choice([m for m in found if counts[m[0]] == rarest])
        if rarest >= LARGEST_SHARE * (len(made) + len(WORDS)) / len(WORDS):
            continue
        counts[chosen[0]] += 1
        text = example.text[: chosen.start()] + mask + example.text[chosen.end() :]
        made.append(Example(text, chosen[0], example.group))
    return made


def main(argv: list[str] | None = None) -> int:
    return command("sft", argv, __doc__, SFTSettings, make_task)


if __name__ == "__main__":
    sys.exit(main())
