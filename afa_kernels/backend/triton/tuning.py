"""Which tiles a call runs with: what was measured on its card, or a row of the table; and which ones to measure."""

from dataclasses import replace
from functools import lru_cache

from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime import errors

from afa_kernels.backend import measured
from afa_kernels.backend.triton import configs
from afa_kernels.backend.triton.configs import Device, GemmTile, Tile, Tiles

PASSES = ("project", "dy_pass", "x_pass", "x_pass_dropout", "gemm")
# What Triton raises where a tile is too much for the device, and how the RuntimeErrors of its compilers begin. In place
# of PTXASError Triton 3.2 raises one of these.
_TOO_MUCH = (errors.OutOfResources, CompilationError, getattr(errors, "PTXASError", errors.OutOfResources))
_GIVES_UP = ("PassManager::run failed", "AMD LLVM ", "Internal Triton PTX codegen error", "`ptxas` ")


def tiles(device: Device, x: Tensor, b: Tensor) -> Tiles:
    """Return the tiles for a call with input ``x (M, K)`` and ``b (N, r)``, or one for each owner."""
    n, r = b.shape[-2:]
    row = configs.table_tiles(device.arch, x.element_size(), r)
    kind = measured.EXPERTS if b.dim() == 3 else measured.LAYER
    entry = measured.lookup(x.device, kind, x.dtype, x.shape[1], n, r, x.shape[0])
    if entry is None or entry.weights != str(b.dtype).removeprefix("torch."):
        return row
    return chosen(row, entry.tiles)


@lru_cache(maxsize=256)
def chosen(row: Tiles, numbers: tuple[tuple[str, int], ...]) -> Tiles:
    """Return ``row`` with the candidate of that number for each pass; ``row`` itself where there is none."""
    found = {}
    for name, number in numbers:
        options = candidates(getattr(row, name)) if name in PASSES else []
        if not 0 <= number < len(options):
            return row
        found[name] = options[number]
    return replace(row, **found)


def candidates(tile: Tile) -> list[Tile]:
    """Return ``tile`` and its neighbours: half or twice the rows, columns and warps, one stage more or less."""
    found = [tile]
    for factor in (0.5, 2):
        rows, cols, warps = (int(size * factor) for size in (tile.rows, tile.cols, tile.warps))
        if 32 <= rows <= configs.MAX_TILE_ROWS:
            found.append(replace(tile, rows=rows))
        if 32 <= cols <= 512:
            found.append(replace(tile, cols=cols))
        if 4 <= warps <= 8:
            found.append(replace(tile, warps=warps))
        if isinstance(tile, GemmTile) and 16 <= tile.step * factor <= 128:
            found.append(replace(tile, step=int(tile.step * factor)))
    return found + [replace(tile, stages=stages) for stages in (tile.stages - 1, tile.stages + 1) if 2 <= stages <= 5]


def is_too_much(error: Exception) -> bool:
    """Whether this says that a tile does not fit the device, and nothing else."""
    return isinstance(error, _TOO_MUCH) or (isinstance(error, RuntimeError) and str(error).startswith(_GIVES_UP))
