"""Where a result was measured, and results as a table and as JSON."""

import json
import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import afa_kernels as afa


def environment() -> dict[str, Any]:
    """Return versions, processor, threads and the backends that can run."""
    packages = ("torch", "transformers", "peft", "safetensors")
    return {
        "afa_kernels": afa.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": {
            name: "available" if status.available else status.reason for name, status in afa.backends().items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def standard_error(accuracy: float, examples: int) -> float:
    """Return the standard error of an accuracy measured on ``examples`` independent examples."""
    return math.sqrt(accuracy * (1 - accuracy) / examples)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a fixed-width table: first column to the left, the others to the right."""
    cells = [tuple(header), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        rest = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((f"{row[0]:<{widths[0]}}", *rest)))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
