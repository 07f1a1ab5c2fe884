"""JSON lines: one record a line, each of a kind with fixed fields."""

import json
import math
from pathlib import Path

from bench.shapes import Case

RESULTS = Path(__file__).parent / "results"
_NUMBER = (int, float)
_CASE = {name: _NUMBER if kind is float else kind for name, kind in Case.__annotations__.items()}
_PROVIDER = {"provider": str, "ours": bool}
FIELDS: dict[str, dict[str, object]] = {
    "environment": {
        "time": str,
        "commit": str,
        "dirty": bool,
        "command": str,
        "afa_kernels": str,
        "backends": dict,
        "python": str,
        "packages": dict,
        "platform": str,
        "device": str,
        "cpu": str,
        "cores": int,
        "threads": int,
        "variables": dict,
        "isa": dict,
        "load": _NUMBER,
    },
    "roof": {"device": str, "copy_bytes": int, "copy_gb_s": _NUMBER, "gemm_size": dict, "gemm_gflop_s": dict},
    "row": {
        **_CASE,
        **_PROVIDER,
        "pass": str,
        "function": str,
        "p20_ms": _NUMBER,
        "p50_ms": _NUMBER,
        "p80_ms": _NUMBER,
        "calls": int,
        "rounds": int,
        "ratio": dict,
        "ratio_interval": dict,
        "gflop_s": _NUMBER,
        "gflop_share": _NUMBER,
        "gb_s": _NUMBER,
        "gb_share": _NUMBER,
        "error": _NUMBER,
        "error_ratio": _NUMBER,
        "peak_bytes": int,
        "allocated_bytes": int,
        "saved_bytes": int,
        "cache": str,
        "launch": str,
    },
    "absent": {**_CASE, **_PROVIDER, "reason": str},
    "wrong": {**_CASE, **_PROVIDER, "error": _NUMBER, "error_ratio": _NUMBER},
    "skipped": {**_CASE, "reason": str},
    "training": {
        "model": str,
        "base": str,
        "checkpointing": str,
        "method": str,
        "peak_mb": _NUMBER,
        "ms": _NUMBER,
    },
    "self_check": {"pairs": int, "include_one": int, "largest": _NUMBER},
}
OPTIONAL: dict[str, dict[str, object]] = {
    "training": {"of_peft": _NUMBER},
    "environment": {"gpu": dict, "clock": str, "allocator": str},
    "row": {
        "floor_ms": _NUMBER,
        "tax": _NUMBER,
        "tax_interval": list,
        "floor_tax": _NUMBER,
        "over_floor": _NUMBER,
        "peft_share": _NUMBER,  # the tax over that of provider "peft"
        "peft_share_interval": list,
        "adamw_ratio": _NUMBER,  # a variant of AdamW over the pass "adamw"
        "adamw_ratio_interval": list,
    },
}
# Two rows with the same key measure the same thing.
KEY = (*_CASE, "pass", "provider", "cache", "launch")


def validate(record: dict[str, object]) -> None:
    """Raise ValueError naming the field unless ``record`` is of a known kind, with its fields and
    no others, each of its type and finite."""
    kind = record.get("kind")
    if kind not in FIELDS:
        raise ValueError(f"kind: expected one of {', '.join(FIELDS)}, got {kind!r}")
    required, optional = FIELDS[kind], OPTIONAL.get(kind, {})
    missing = required.keys() - record.keys()
    unknown = record.keys() - required.keys() - optional.keys() - {"kind"}
    if missing or unknown:
        raise ValueError(f"{kind}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    for name, expected in {**required, **optional}.items():
        if name not in record:
            continue
        value = record[name]
        if isinstance(value, bool) and expected is not bool or not isinstance(value, expected):
            raise ValueError(f"{kind}.{name}: expected {expected}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value) and kind != "wrong":
            raise ValueError(f"{kind}.{name}: expected a finite number, got {value!r}")


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def recorded() -> list[Path]:
    """Return the files of records in ``results``."""
    return sorted(RESULTS.glob("*.jsonl"))


def key(row: dict[str, object]) -> tuple:
    return tuple(row[name] for name in KEY)


class Writer:
    """Appends validated records to a file, each as soon as it is known, so that an interrupted run
    keeps what it measured."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path = path

    def write(self, record: dict[str, object]) -> None:
        record = _rounded(record)
        validate(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _rounded(value):
    """Return ``value`` with floats cut to 5 significant digits: no timing has more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
