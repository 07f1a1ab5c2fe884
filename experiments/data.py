"""Text that every Python brings, as bytes, and data of one's own.

The tokenizer is ByT5's: a byte ``b`` is the token ``b + 3``; 0 pads, 1 ends a document. Nothing has to be downloaded or
trained for it, and a loss in nats per byte compares models of any size.
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ByT5Tokenizer

from examples.demo.data import standard_library

OFFSET = 3  # tokens before the first byte: padding, end of document, unknown
END = 1
VOCABULARY = OFFSET + 256
PARTS = ("train", "validation", "test")
# pydoc_data is the English text that a model of the standard library's source is later adapted to.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "lib2to3", "__pycache__"}
HELD_OUT_FILES = 40  # one file of so many is held out
HELD_OUT_TOPICS = {"validation": 0.15, "test": 0.2}  # of the bytes


def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0)


def encode(text: str) -> Tensor:
    """Return the ids of ``text``, ``(bytes,)``, without an end."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.long) + OFFSET


def standard_library_source(root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the ids of the standard library's source, tests left out: to train, and held-out files."""
    root = root or standard_library()
    parts: list[list[Tensor]] = [[], []]
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT_FILES == 0
            text = file.read_text(encoding="utf-8", errors="replace")
            parts[held_out] += [encode(text), torch.tensor([END])]
    train, held_out = (torch.cat(part) for part in parts)
    return train, held_out


def topic_texts(seed: int = 0) -> dict[str, str]:
    """Return ``pydoc_data.topics`` (the help on the language) as train, validation and test text, split by topic.

    Topics share paragraphs: a held-out paragraph that a part before it has, line breaks included, is dropped. What is
    left in common is 3 % of the validation and 1 % of the test text.
    """
    from pydoc_data.topics import topics as texts

    names = sorted(texts)
    random.Random(seed).shuffle(names)
    room = {name: share * sum(map(len, texts.values())) for name, share in HELD_OUT_TOPICS.items()}
    chosen: dict[str, list[str]] = {part: [] for part in PARTS}
    for topic in names:
        part = next((p for p in room if len(texts[topic]) <= room[p]), "train")
        chosen[part].append(topic)
        if part in room:
            room[part] -= len(texts[topic])
    seen: set[str] = set()
    joined = {}
    for part, members in chosen.items():
        own = [paragraph for topic in members for paragraph in (*texts[topic].split("\n\n"), "")]
        joined[part] = "\n\n".join(p for p in own if p not in seen)
        seen |= {paragraph for paragraph in own if paragraph}
    return joined


def batch(ids: Tensor, size: int, length: int, seed: int, step: int) -> Tensor:
    """Return ``size`` random windows of ``ids``, ``(size, length)``: the same for the same seed and step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - length + 1, (size,), generator=generator)
    return ids[starts.unsqueeze(1) + torch.arange(length)]


def windows(ids: Tensor, length: int, size: int = 32, limit: int | None = None) -> Iterator[Tensor]:
    """Yield the consecutive windows of ``ids`` in batches ``(<= size, length)``, at most ``limit`` windows, spread
    evenly over ``ids``. A rest shorter than ``length`` is left out."""
    rows = ids[: len(ids) // length * length].view(-1, length)
    if limit is not None and limit < len(rows):
        rows = rows[torch.linspace(0, len(rows) - 1, limit).round().long()]
    yield from rows.split(size)


def loss(model: nn.Module, tokens: Tensor, first: int = 1) -> Tensor:
    """Return the mean cross-entropy of the tokens from place ``first`` on in nats; tokens are ``(batch, length)``."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, first - 1 : -1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, first:].flatten())


@torch.no_grad()
def nats_per_token(model: nn.Module, ids: Tensor, length: int, limit: int | None = None) -> float:
    """Return the mean loss over ``windows(ids, length)``; the model's mode is left as it was."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    for rows in windows(ids, length, limit=limit):
        total += loss(model, rows.to(next(model.parameters()).device)).item() * len(rows)
        count += len(rows)
    model.train(training)
    return total / count


def rows_of(source: str, columns: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each part of a text, CSV or JSON-lines file or of a data set of the hub. A part that the data
    do not have is the last tenth of what there is to train on.

    Raises:
        ValueError: a column is missing.
    """
    from datasets import load_dataset

    kind = {".txt": "text", ".md": "text", ".csv": "csv", ".jsonl": "json"}.get(Path(source).suffix)
    loaded = load_dataset(kind, data_files=source) if kind else load_dataset(source)
    missing = [column for column in columns if column not in loaded["train"].column_names]
    if missing:
        raise ValueError(f"data: expected a column {missing[0]!r} in {source}, got {loaded['train'].column_names}")
    rows = {part: list(loaded[part]) for part in PARTS if part in loaded}
    held_out = max(1, len(rows["train"]) // 10)
    for part in ("test", "validation"):
        if part not in rows:
            rows["train"], rows[part] = rows["train"][:-held_out], rows["train"][-held_out:]
    return rows


def existing(folder: Path) -> Path:
    """Return the folder of a model that pretrain.py makes."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model: {folder} is missing: run python -m experiments.pretrain (experiments/README.md), or give a model"
        )
    return folder
