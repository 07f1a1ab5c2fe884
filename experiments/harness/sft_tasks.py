"""The two tasks of ``sft.py``: next-token prediction, and classification with a new head."""

import hashlib
import platform
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo.classifier import Batch, Classifier, Encoded, packaged_model
from examples.demo.data import Example, Splits
from experiments.harness import bytelm, keywords, user_data
from experiments.harness.sft_config import Settings

_FINGERPRINT_BYTES = 2**20  # of each weight file: more would take long for a large model


class Task(Protocol):
    """A pretrained model and data."""

    head: str | None  # name of the new module that every method trains
    metric: str  # what is compared, a key of every score
    higher_is_better: tuple[str, ...]  # the scores of which that is so; of others, lower is better

    def fingerprint(self) -> dict[str, Any]: ...

    def model(self, seed: int) -> nn.Module: ...

    def batch(self, size: int, seed: int, step: int) -> Any: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]: ...

    def logits(self, model: nn.Module) -> Tensor: ...

    def save(self, model: nn.Module, folder: Path) -> None: ...

    def load(self, folder: Path) -> nn.Module: ...


def make(settings: Settings) -> Task:
    return (LanguageModelling if settings.task == "lm" else Classification)(settings)


class LanguageModelling:
    """A causal language model; the score is the mean loss of the next token."""

    head = None
    higher_is_better = ()

    def __init__(self, settings: Settings):
        self.path = settings.model or bytelm.DEFAULT_FOLDER
        if settings.model is None and not (self.path / "config.json").is_file():
            raise SystemExit(f"no model in {self.path}: run python -m experiments.pretrain first, or give --model")
        self.length = settings.length
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        texts = user_data.texts(settings.data, settings.text_column) if settings.data else bytelm.topic_texts()
        byte_level = isinstance(self.tokenizer, type(bytelm.tokenizer()))
        self.metric = "nats per byte" if byte_level else "nats per token"
        self.parts = {part: bytelm.encode(t) if byte_level else self._tokens(t) for part, t in texts.items()}
        for part, ids in self.parts.items():
            if len(ids) < self.length:
                raise ValueError(f"data: expected at least {self.length} tokens to {part}, got {len(ids)}")

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fingerprint(self) -> dict[str, Any]:
        return {"weights": _weights(self.path), "data": _digest(*(t.numpy().tobytes() for t in self.parts.values()))}

    def model(self, seed: int) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)

    def batch(self, size: int, seed: int, step: int) -> Tensor:
        return bytelm.batch(self.parts["train"], size, self.length, seed, step)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return bytelm.loss(model, batch.to(_device(model)))

    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        return {self.metric: bytelm.nats_per_byte(model, self.parts[part], self.length, limit)}

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits of some test windows, to compare models."""
        model.eval()
        rows = next(bytelm.windows(self.parts["test"], self.length, limit=8))
        return model(input_ids=rows.to(_device(model)), use_cache=False).logits.float().cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


class Classification:
    """An encoder and a new linear head; the score is the cross-entropy, accuracy stands beside it."""

    head = "head"
    metric = "nats per label"
    higher_is_better = ("accuracy",)

    def __init__(self, settings: Settings):
        self.path = settings.model or packaged_model()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        splits = self._own_data(settings) if settings.data else keywords.load(self.tokenizer.mask_token or "_")
        self.labels = splits.labels
        self.parts = {
            part: Encoded(getattr(splits, part), splits.labels, self.path, settings.length) for part in user_data.PARTS
        }
        self._texts = [f"{e.label}:{e.text}" for part in user_data.PARTS for e in getattr(splits, part)]
        self._settings = settings

    def _own_data(self, settings: Settings) -> Splits:
        rows = user_data.rows_of(settings.data, (settings.text_column, settings.label_column))
        parts = {
            part: [Example(str(r[settings.text_column]), str(r[settings.label_column]), ("", "")) for r in own]
            for part, own in rows.items()
        }
        labels = sorted({e.label for own in parts.values() for e in own})
        return Splits(tuple(labels), **parts, near_duplicates=0)

    def fingerprint(self) -> dict[str, Any]:
        return {"weights": _weights(self.path), "data": _digest(*(t.encode() for t in self._texts))}

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)  # of the head
        model = Classifier(self.path, len(self.labels))
        if self._settings.keep_layers is not None:
            model.keep_layers(self._settings.keep_layers)
        return model

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """Return random examples; none is repeated before all were used."""
        return self.parts["train"].training_batch(size, seed, step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        device = _device(model)
        return nn.functional.cross_entropy(_logits(model, batch).float(), batch.labels.to(device))

    @torch.no_grad()
    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        training = model.training
        model.eval()
        total, right, count = 0.0, 0, 0
        for batch in self.parts[part].evaluation_batches(limit=limit):
            logits = _logits(model, batch).float().cpu()
            total += nn.functional.cross_entropy(logits, batch.labels, reduction="sum").item()
            right += (logits.argmax(1) == batch.labels).sum().item()
            count += len(batch)
        model.train(training)
        return {self.metric: total / count, "accuracy": right / count}

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits of some test examples, to compare models."""
        model.eval()
        batches = self.parts["test"].evaluation_batches(limit=64)
        return torch.cat([_logits(model, batch).float().cpu() for batch in batches])

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the encoder as transformers loads it, and the head beside it."""
        model.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        head = {name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}
        save_file(head, folder / "head.safetensors", metadata={"labels": ",".join(self.labels)})

    def load(self, folder: Path) -> nn.Module:
        from safetensors.torch import load_file

        model = Classifier(folder, len(self.labels))
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
        return model


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    device = _device(model)
    return model(batch.input_ids.to(device), batch.attention_mask.to(device))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _digest(*pieces: bytes) -> str:
    digest = hashlib.sha256(platform.python_version().encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]


def _weights(path: str | Path) -> str:
    """Return what tells one set of weights from another: a digest of a folder's files, or the id."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    pieces = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            pieces += [str(file.stat().st_size).encode(), stream.read(_FINGERPRINT_BYTES)]
    return _digest(*pieces)
