"""Real labelled text that every Python brings: functions of its standard library.

The task is to say which module a function comes from, given the first tokens of its source. What is
held out is whole top-level definitions: methods of one class never lie on both sides. Texts that
occur twice, and held-out texts that overlap much with a text of another split, are dropped, so a
held-out score is no memory of copies.
"""

import ast
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

# In every CPython from 3.10 on, in the small packages of Linux distributions too, and with enough
# functions to hold some out.
LABELS = (
    "argparse",
    "ast",
    "asyncio",
    "_pydecimal",
    "email",
    "encodings",
    "http",
    "importlib",
    "inspect",
    "logging",
    "mailbox",
    "multiprocessing",
    "pydoc",
    "tarfile",
    "typing",
    "unittest",
    "urllib",
    "xml",
    "xmlrpc",
    "zipfile",
)
SHOWN_TOKENS = 32  # of the source, counted by _TOKEN; a model's tokens are the same or pieces
MIN_TOKENS = 24
HELD_OUT = {"test": 0.25, "validation": 0.1}  # of the functions of each label
_LARGEST_HELD_OUT_GROUP = 0.15
_SHINGLE = 5
_MAX_OVERLAP = 0.5
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Example:
    """A function: the start of its source, its module, and the top-level definition around it."""

    text: str
    label: str
    group: tuple[str, str]  # file, name of the top-level class or function


@dataclass(frozen=True)
class Splits:
    labels: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    near_duplicates: int  # dropped from validation and test


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def load(labels: Sequence[str] = LABELS, *, root: Path | None = None, seed: int = 0) -> Splits:
    """Return the deduplicated functions of ``labels``, split by top-level definition.

    Raises:
        ValueError: fewer than two of the modules are found under ``root``.
    """
    root = root or standard_library()
    examples = without_duplicates(e for label in labels for e in functions(root, label))
    found = tuple(sorted({e.label for e in examples}))
    if len(found) < 2:
        raise ValueError(f"root: expected sources of modules such as {labels[0]} in {root}")
    parts = split_by_group(examples, seed)
    validation = without_near_duplicates(parts["validation"], parts["train"])
    test = without_near_duplicates(parts["test"], parts["train"] + validation)
    dropped = len(parts["validation"]) + len(parts["test"]) - len(validation) - len(test)
    return Splits(found, parts["train"], validation, test, dropped)


def functions(root: Path, label: str) -> Iterator[Example]:
    """Yield the functions and methods of the module or package ``label``, tests left out."""
    package = root / label
    files = sorted(package.rglob("*.py")) if package.is_dir() else [root / f"{label}.py"]
    for file in files:
        if not file.is_file() or {"test", "tests"} & set(file.relative_to(root).parts):
            continue
        source = file.read_text(encoding="utf-8")
        lines = source.split("\n")  # as the parser counts: splitlines also breaks at form feeds
        for node, top in _definitions(ast.parse(source).body):
            text = shown("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(_TOKEN.findall(text)) >= MIN_TOKENS:
                yield Example(text, label, (file.relative_to(root).as_posix(), top))


def _definitions(body: list[ast.stmt], top: str | None = None) -> Iterator[tuple[ast.AST, str]]:
    """Yield functions outside other functions, with the name of their top-level definition."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, top or node.name
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, top or node.name)
        elif isinstance(node, (ast.If, ast.Try)):
            handlers = [statement for h in getattr(node, "handlers", ()) for statement in h.body]
            yield from _definitions([*node.body, *handlers, *node.orelse], top)


def shown(source: str) -> str:
    """Return the start of ``source`` that a model may see, on one line."""
    ends = [match.end() for match in islice(_TOKEN.finditer(source), SHOWN_TOKENS)]
    return " ".join(source[: ends[-1]].split()) if ends else ""


def without_duplicates(examples: Iterable[Example]) -> list[Example]:
    """Keep one example of each text, and none of a text that has several labels."""
    by_text: dict[str, Example] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        by_text.setdefault(example.text.lower(), example)
        labels[example.text.lower()].add(example.label)
    return [example for text, example in by_text.items() if len(labels[text]) == 1]


def split_by_group(examples: Sequence[Example], seed: int) -> dict[str, list[Example]]:
    """Assign whole groups to train, validation and test, close to ``HELD_OUT`` for each label."""
    parts: dict[str, list[Example]] = {"train": [], **{name: [] for name in HELD_OUT}}
    by_label: dict[str, dict[tuple[str, str], list[Example]]] = defaultdict(dict)
    for example in examples:
        by_label[example.label].setdefault(example.group, []).append(example)
    for label in sorted(by_label):
        groups = [by_label[label][key] for key in sorted(by_label[label])]
        random.Random(f"{seed} {label}").shuffle(groups)
        total = sum(map(len, groups))
        room = {name: fraction * total for name, fraction in HELD_OUT.items()}
        for group in groups:
            fits = [name for name in room if len(group) <= room[name]]
            small = len(group) <= max(1, _LARGEST_HELD_OUT_GROUP * total)
            part = fits[0] if fits and small else "train"
            parts[part] += group
            if part in room:
                room[part] -= len(group)
    for name, part in parts.items():
        random.Random(f"{seed} {name}").shuffle(part)
    return parts


def without_near_duplicates(examples: list[Example], others: Iterable[Example]) -> list[Example]:
    """Drop each example that shares half of its 5-token shingles with one of ``others``."""
    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, other in enumerate(others):
        for shingle in shingles(other.text):
            owners[shingle].append(index)
    kept = []
    for example in examples:
        own = shingles(example.text)
        shared = Counter(index for shingle in own for index in owners.get(shingle, ()))
        if max(shared.values(), default=0) < _MAX_OVERLAP * len(own):
            kept.append(example)
    return kept


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return all runs of 5 tokens."""
    tokens = _TOKEN.findall(text.lower())
    return {tuple(tokens[i : i + _SHINGLE]) for i in range(max(1, len(tokens) - _SHINGLE + 1))}
