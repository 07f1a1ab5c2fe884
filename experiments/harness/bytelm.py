"""A small Llama that reads bytes, and text that every Python brings.

The tokenizer is ByT5's: a byte ``b`` is the token ``b + 3``; 0 pads, 1 ends a document. Nothing has to be downloaded or
trained for it, and a loss in nats per byte compares models of any size.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from examples.demo.data import standard_library

OFFSET = 3  # tokens before the first byte: padding, end of document, unknown
END = 1
VOCABULARY = OFFSET + 256
HEAD_SIZE = 32
# pydoc_data is the English text that a model of the standard library's source is later adapted to.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "lib2to3", "__pycache__"}
HELD_OUT_FILES = 40  # one file of so many is held out
HELD_OUT_TOPICS = {"validation": 0.15, "test": 0.2}  # of the bytes
DEFAULT_FOLDER = Path("outputs/pretrained")


@dataclass(frozen=True)
class Text:
    """Token ids ``(tokens,)``, int64, of the three parts of a text."""

    train: Tensor
    validation: Tensor
    test: Tensor


def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0)


def encode(text: str) -> Tensor:
    """Return the ids of ``text``, ``(bytes,)``, without an end."""
    raw = torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8) if text else torch.empty(0)
    return raw.long() + OFFSET


def config(hidden: int = 160, layers: int = 4) -> LlamaConfig:
    """Return the configuration of a Llama over bytes; 160 and 4 make 1.26 million parameters.

    Raises:
        ValueError: ``hidden`` is no positive multiple of 32, or ``layers`` is less than 1.
    """
    if hidden < HEAD_SIZE or hidden % HEAD_SIZE:
        raise ValueError(f"hidden: expected a positive multiple of {HEAD_SIZE}, got {hidden}")
    if layers < 1:
        raise ValueError(f"layers: expected at least 1, got {layers}")
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=END,
        bos_token_id=None,
        tie_word_embeddings=False,
    )


def new_model(hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(hidden, layers))


def standard_library_source(root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the ids of the standard library's source, tests left out: to train, and held-out files.

    Raises:
        ValueError: there is no source to train on under ``root``.
    """
    root = root or standard_library()
    parts: list[list[Tensor]] = [[], []]
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if LEFT_OUT & set(name.parts):
            continue
        held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT_FILES == 0
        text = file.read_text(encoding="utf-8", errors="replace")
        parts[held_out] += [encode(text), torch.tensor([END])]
    if not parts[0]:
        raise ValueError(f"root: expected Python source files in {root}")
    train, held_out = (torch.cat(part) if part else torch.empty(0, dtype=torch.long) for part in parts)
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
    chosen: dict[str, list[str]] = {"train": [], **{name: [] for name in room}}
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


def topics(seed: int = 0) -> Text:
    """Return the ids of :func:`topic_texts`."""
    return Text(**{part: encode(text) for part, text in topic_texts(seed).items()})


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


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token in nats; tokens are ``(batch, length)``."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def nats_per_byte(model: nn.Module, ids: Tensor, length: int = 128, limit: int | None = None) -> float:
    """Return the mean loss over ``windows(ids, length)``; the model's mode is left as it was."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for rows in windows(ids, length, limit=limit):
        total += loss(model, rows).item() * len(rows)
        count += len(rows)
    model.train(training)
    if not count:
        raise ValueError(f"ids: expected at least {length} tokens, got {len(ids)}")
    return total / count
