"""Records of finished commands, and tables in Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finished(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record that a command left in ``file`` at its end, or None if there is none.

    Raises:
        SystemExit: it was made with other settings.
    """
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["settings"] != settings:
        made = record["settings"]
        raise SystemExit(f"{file.parent} was made with {made}; --force makes it again, --output elsewhere")
    return record


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
