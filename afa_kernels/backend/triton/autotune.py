"""Which tiles a call runs with: a row of the table, or, with AFA_KERNELS_AUTOTUNE=1, the fastest of
a few candidates.

Without the variable nothing is ever timed: the first call of a shape class does not stall, ranks of
a distributed job agree, and results do not change from run to run. With it, the first call of a
shape class times the candidates on random data and stores the winner as JSON under
``$AFA_KERNELS_CACHE_DIR``, by default ``~/.cache/afa_kernels``.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime import errors

from afa_kernels.backend.triton import configs, launch, passes
from afa_kernels.backend.triton.configs import Device, GemmTile, Tile, Tiles
from afa_kernels.operator.options import Spec

ENABLE_VARIABLE = "AFA_KERNELS_AUTOTUNE"
CACHE_VARIABLE = "AFA_KERNELS_CACHE_DIR"
_PASSES = ("project", "dy_pass", "x_pass", "x_pass_dropout")
_LARGEST_ROWS = 16384  # tokens above this are timed as this many
# What Triton raises where a tile is too much for the device, and how the RuntimeErrors of its compilers begin. In place
# of PTXASError Triton 3.2 raises one of these.
_TOO_MUCH = (errors.OutOfResources, CompilationError, getattr(errors, "PTXASError", errors.OutOfResources))
_GIVES_UP = ("PassManager::run failed", "AMD LLVM ", "Internal Triton PTX codegen error", "`ptxas` ")

_tuned: dict[tuple[str, str], Tiles] = {}  # (device name, key): what this process has read or tuned


def tiles(device: Device, x: Tensor, b: Tensor) -> Tiles:
    """Return the tiles for a call with input ``x (M, K)`` and ``b (N, r)``, or one for each owner."""
    n, r = b.shape[-2:]
    row = configs.table_tiles(device.arch, x.element_size(), r)
    if os.environ.get(ENABLE_VARIABLE) != "1":
        return row
    m, k = x.shape
    m = min(triton.next_power_of_2(m), _LARGEST_ROWS)
    r = configs.padded_rank(r)
    dtype, weights = (str(t.dtype).removeprefix("torch.") for t in (x, b))
    key = f"{dtype} M={m} K={k} N={n} r={r} weights={weights}"
    found = _tuned.get((device.name, key)) or _read(device).get(key)
    if found is None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return row
        found = tune(row, problem_timer(x.device, x.dtype, m, k, n, r, b.dtype))
        _store(device, key, found)
    _tuned[device.name, key] = found
    return found


def candidates(tile: Tile) -> list[Tile]:
    """Return ``tile`` and its neighbours: half or twice the rows, columns and warps, one stage more
    or less."""
    found = [tile]
    for factor in (0.5, 2):
        rows, cols, warps = (
            int(tile.rows * factor),
            int(tile.cols * factor),
            int(tile.warps * factor),
        )
        if 32 <= rows <= configs.MAX_TILE_ROWS:
            found.append(replace(tile, rows=rows))
        if 32 <= cols <= 512:
            found.append(replace(tile, cols=cols))
        if 4 <= warps <= 8:
            found.append(replace(tile, warps=warps))
    return found + [replace(tile, stages=stages) for stages in (tile.stages - 1, tile.stages + 1) if 2 <= stages <= 5]


def tune(row: Tiles, seconds: Callable[[str, Tiles], float]) -> Tiles:
    """Return ``row`` with each pass's tile replaced by its fastest candidate.

    Args:
        row: the tiles to start from.
        seconds: time of a pass with some tiles; infinite where they do not fit the device.
    """
    for name in _PASSES:
        options = [replace(row, **{name: tile}) for tile in candidates(getattr(row, name))]
        times = [seconds(name, option) for option in options]
        row = options[times.index(min(times))]
    return row


def problem_timer(
    device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, r: int, weights: torch.dtype
) -> Callable[[str, Tiles], float]:
    """Return a function that times one pass of a call of this shape on random data, with A and B in ``weights``."""
    # Of its own: with the caller's generator, dropout would depend on whether the cache was cold.
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    x, a, b, dy, z = random(m, k), random(r, k).to(weights), random(n, r).to(weights), random(m, n), random(m, r)
    y = torch.empty_like(dy)
    alpha_t = torch.full((), 0.5, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)

    def run(name: str, tiles: Tiles) -> None:
        spec = Spec("silu", 1.0, 26 if name == "x_pass_dropout" else 0)
        context = launch.Context(x, a, b, alpha_t, seed, spec, tiles)
        if name == "project":
            passes.forward(context, None, y, True)
        else:
            dx_side = name != "dy_pass"
            passes.backward(context, dy, z, weights, weights, need_dx=dx_side, need_da=dx_side, need_db=not dx_side)

    def seconds(name: str, tiles: Tiles) -> float:
        try:
            return triton.testing.do_bench(lambda: run(name, tiles), return_mode="median") * 1e-3
        except _TOO_MUCH:
            return float("inf")
        except RuntimeError as error:
            if str(error).startswith(_GIVES_UP):
                return float("inf")
            raise

    return seconds


def cache_file(device: Device) -> Path:
    folder = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "afa_kernels"
    return Path(folder) / f"triton-{triton.__version__}-{re.sub(r'[^A-Za-z0-9]+', '-', device.name)}.json"


def _read(device: Device) -> dict[str, Tiles]:
    try:
        stored = json.loads(cache_file(device).read_text())
        return {
            key: Tiles(**{name: _tile(value) if isinstance(value, dict) else value for name, value in row.items()})
            for key, row in stored.items()
        }
    except (OSError, ValueError, TypeError):
        return {}  # nothing stored yet, or by another version: tuned again


def _tile(fields: dict[str, int]) -> Tile:
    return GemmTile(**fields) if "step" in fields else Tile(**fields)


def _store(device: Device, key: str, found: Tiles) -> None:
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: asdict(row) for name, row in (_read(device) | {key: found}).items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(rows, indent=1))
    temporary.replace(path)  # atomic: processes of one job may tune at the same time
