"""What ``python -m afa_kernels --tune`` measured on a card, in one file for each, and what follows for a call.

A file is of one card, driver and version of torch, Triton and this package; another one's is ignored, and so is what
cannot be read: it never breaks a call. What it says of a layer holds for any number of rows, unless it was measured for
some of them alone (``--by-tokens``).
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from afa_kernels import torch_private
from afa_kernels.backend.interface import Call

FOLDER_VARIABLE = "AFA_KERNELS_CACHE_DIR"
LAYER, EXPERTS = "layer", "experts"  # one owner has all rows, or each has a frozen matrix
FUSED = "triton, one GEMM"  # the product with the weights of experts in the kernels of ``triton``
_CARDS = {"cuda": torch.cuda, "xpu": torch.xpu}


class Key(NamedTuple):
    kind: str
    dtype: str
    k: int
    n: int
    r: int  # the largest of its class: 16, 32, 64, ...

    @classmethod
    def of(cls, kind: str, dtype: torch.dtype, k: int, n: int, r: int) -> "Key":
        return cls(kind, str(dtype).removeprefix("torch."), k, n, max(16, 1 << (r - 1).bit_length()))


class Entry(NamedTuple):
    """What was measured of one layer."""

    key: Key
    us: dict[str, float]  # of a forward and a backward, by what made them
    rows: int | None = None  # it was measured for so many rows alone; None: for any
    weights: str = ""  # dtype of A and B, which the tiles are for
    tiles: tuple[tuple[str, int], ...] = ()  # of ``triton``, the number of a candidate for each pass (tuning.py)

    @property
    def fastest(self) -> str:
        return min(self.us, key=self.us.__getitem__)

    @property
    def reason(self) -> str:
        return "measured on this card: " + ", ".join(f"{name} {us:.0f} us" for name, us in self.us.items())

    @property
    def fuses(self) -> bool | None:
        """Whether ``triton`` makes the product with the weights of experts; None: it was not measured."""
        apart, fused = (self.us.get(name) for name in ("triton", FUSED))
        return None if apart is None or fused is None else fused < apart


_trial: Entry | None = None


@contextlib.contextmanager
def trial(entry: Entry) -> Iterator[None]:
    """Let every call be made as if ``entry`` had been measured of it: what is timed before anything was."""
    global _trial
    before, _trial = _trial, entry
    try:
        yield
    finally:
        _trial = before


def lookup(device: torch.device, kind: str, dtype: torch.dtype, k: int, n: int, r: int, rows: int) -> Entry | None:
    """Return what was measured of such a layer on the card ``device``, or None."""
    if _trial is not None:
        return _trial
    return _lookup(device, kind, dtype, k, n, r, rows) if device.type in _CARDS else None


@lru_cache(maxsize=4096)
def _lookup(device, kind, dtype, k, n, r, rows) -> Entry | None:
    entries, _ = read(device)
    of_layer = [entry for entry in entries if entry.key == Key.of(kind, dtype, k, n, r)]
    # The smallest number of rows that is not below, else the largest one; what holds for any has the last word.
    of_layer.sort(key=lambda entry: (entry.rows is None, (entry.rows or 0) < rows, abs((entry.rows or 0) - rows)))
    return of_layer[0] if of_layer else None


def choice_for(call: Call) -> tuple[str, str] | None:
    """Return the backend that was the fastest for a call, and the reason, or None."""
    if call.device not in _CARDS and _trial is None:
        return None
    kind = EXPERTS if call.owners else LAYER
    device = torch.device(call.device, call.device_index)
    entry = lookup(device, kind, call.dtype, call.k, call.n, call.r, call.m)
    return (entry.fastest.partition(",")[0], entry.reason) if entry is not None else None


# --- the file of a card


def folder() -> Path:
    """Return where the files are: what the environment says, or a cache folder by the rule of platformdirs."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(local) / "afa_kernels" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "afa_kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afa_kernels"


@cache
def identity(device: torch.device) -> dict[str, str]:
    """Return what a measurement hangs on."""
    versions = {"torch": torch.__version__}
    for package in ("triton", "afa_kernels"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    driver = torch_private.driver_version() if device.type == "cuda" else ""
    return {"card": _CARDS[device.type].get_device_name(device), "driver": driver, **versions}


def file_of(device: torch.device) -> Path:
    return folder() / f"tuned-{re.sub(r'[^A-Za-z0-9]+', '-', identity(device)['card']).strip('-').lower()}.json"


@cache
def read(device: torch.device) -> tuple[tuple[Entry, ...], str]:
    """Return what the file of a card holds, and why it is ignored, or an empty string."""
    if device.type not in _CARDS or not _CARDS[device.type].is_available():
        return (), "no card"
    path = file_of(device)
    try:
        stored = json.loads(path.read_text())
        of = {name: stored.get(name) for name in identity(device)}
        found = stored["layers"]
    except FileNotFoundError:
        return (), "nothing was measured (python -m afa_kernels --tune)"
    except (OSError, ValueError, AttributeError, KeyError) as error:
        return (), f"{path} cannot be read: {type(error).__name__}: {error}"
    other = [f"{name} {of[name]}, here {mine}" for name, mine in identity(device).items() if of[name] != mine]
    if other:
        return (), f"{path} is of another machine or version: {'; '.join(other)}"
    entries = tuple(entry for entry in map(_entry, found if isinstance(found, list) else ()) if entry is not None)
    return entries, ""


def _entry(stored: Any) -> Entry | None:
    """Return an entry of a file, or None if it is none."""
    try:
        key = Key(*(stored[name] for name in Key._fields))
        us = {str(name): float(value) for name, value in stored["us"].items()}
        rows, weights, tiles = stored["rows"], stored["weights"], tuple(stored["tiles"].items())
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    sound = isinstance(key.kind, str) and isinstance(key.dtype, str) and isinstance(weights, str)
    sound = sound and all(isinstance(size, int) for size in (*key[2:], *dict(tiles).values()))
    sound = sound and (rows is None or isinstance(rows, int)) and us and min(us.values()) > 0
    return Entry(key, us, rows, weights, tiles) if sound else None


def write(device: torch.device, entries: list[Entry]) -> Path:
    """Add entries to the file of a card, in the place of those of the same layers, and return its path."""
    path = file_of(device)
    new = {(entry.key, entry.rows): entry for entry in entries}
    kept = {(entry.key, entry.rows): entry for entry in read(device)[0]}
    layers = [
        entry.key._asdict() | {"us": entry.us, "rows": entry.rows, "weights": entry.weights, "tiles": dict(entry.tiles)}
        for entry in (kept | new).values()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(identity(device) | {"layers": layers}, indent=1))
    temporary.replace(path)  # atomic: processes of one job may read it
    forget()
    return path


def forget() -> None:
    """Read files again."""
    for remembered in (_lookup, read, identity):
        remembered.cache_clear()
