"""Text of one's own: a file, a folder or a data set of the Hugging Face hub, in three parts."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1  # of the rows or characters, where the data itself has no such part
TEXT_FILES = (".txt", ".md", ".rst", ".py")

Rows = dict[str, list[dict[str, Any]]]


def texts(source: str, column: str) -> dict[str, str]:
    """Return the text of each part, documents joined by blank lines."""
    path = Path(source)
    if path.is_dir() or path.suffix in TEXT_FILES:
        files = sorted(f for f in path.rglob("*") if f.suffix in TEXT_FILES) if path.is_dir() else [path]
        text = "\n\n".join(_read(file) for file in files)
        if not text:
            raise ValueError(f"data: expected files such as *{TEXT_FILES[0]} in {path}")
        return dict(zip(PARTS, _cut(text), strict=True))
    return {part: "\n\n".join(str(row[column]) for row in rows) for part, rows in rows_of(source, (column,)).items()}


def rows_of(source: str, columns: Sequence[str]) -> Rows:
    """Return the rows of each part of a CSV or JSON-lines file, or of a data set of the hub.

    Raises:
        ValueError: the file is missing, is no such file, or lacks a column.
        SystemExit: a data set of the hub is asked for and the package ``datasets`` is not installed.
    """
    path = Path(source)
    if path.suffix == ".csv":
        rows = list(csv.DictReader(_read(path).splitlines()))
    elif path.suffix in (".jsonl", ".json"):
        rows = [json.loads(line) for line in _read(path).splitlines() if line.strip()]
    elif path.exists() or path.suffix in TEXT_FILES:
        raise ValueError(f"data: expected a .csv or .jsonl file with the columns {', '.join(columns)}, got {path}")
    else:
        return _from_hub(source, columns)
    _check_columns(source, rows, columns)
    return dict(zip(PARTS, _cut(rows), strict=True))


def _from_hub(name: str, columns: Sequence[str]) -> Rows:
    try:
        import datasets
    except ImportError:
        raise SystemExit(
            f"data: {name!r} is no file here, and data sets of the hub need a package: pip install datasets"
        ) from None
    loaded = datasets.load_dataset(name)
    if "train" not in loaded:
        raise ValueError(f"data: expected a part called train in {name}, got {', '.join(loaded)}")
    train, validation, test = _cut(list(loaded["train"]))
    if "test" in loaded:
        train, test = [*train, *test], list(loaded["test"])
    if "validation" in loaded:
        train, validation = [*train, *validation], list(loaded["validation"])
    for rows in (train, validation, test):
        _check_columns(name, rows, columns)
    return {"train": train, "validation": validation, "test": test}


def _check_columns(source: str, rows: Sequence[dict], columns: Sequence[str]) -> None:
    if not rows:
        raise ValueError(f"data: no rows in {source}")
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise ValueError(f"data: expected a column {missing[0]!r} in {source}, got {', '.join(map(str, rows[0]))}")


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"data: no file {path}")
    return path.read_text(encoding="utf-8")


def _cut(items):
    """Return the first 80 % of a list or text, the next 10 % and the last 10 %."""
    held_out = max(1, int(HELD_OUT_SHARE * len(items)))
    end = len(items) - held_out
    return items[: end - held_out], items[end - held_out : end], items[end:]
