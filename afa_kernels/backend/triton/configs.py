"""The tiles of every kernel: one row per (architecture, bytes per element, padded rank), and
defaults for the rest.

Which rows compile without a spill, and what registers and shared memory they take, is what ``make
triton-report`` prints; what they cost in memory traffic is in bench/model/traffic.py. Their speed
has not been measured on a GPU.
"""

import functools
from dataclasses import dataclass, replace

import torch

RANKS = (
    16,
    32,
    64,
    128,
)  # the padded ranks; a larger rank is compute-bound and belongs to torch's GEMMs
MAX_RANK = RANKS[-1]
MAX_TILE_ROWS = 128
# up to here one pass over dy makes dh and db; above, dh partials cost more than a second pass
ONE_PASS_RANK = 32
# Up to here the kernels round float32 a and b, and mask their rank, themselves. Above, each tile of rows would read
# twice the bytes of a and b again through L2: at M = 8192, K = N = 4096 and rank 64 that is 12 us for each of three
# reads, where a launch that rounds once takes 2 to 3 us. At rank 32 it is 4 us in all, less than both launches took.
UNPACKED_RANK = 32
DEFAULT = "default"
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: rows of tokens, columns of the streamed operand, warps and pipeline
    stages."""

    rows: int
    cols: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GemmTile(Tile):
    """The tile of a product with frozen matrices: ``step`` terms of its sums at a time."""

    step: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of one (architecture, element size, padded rank)."""

    project: Tile  # F, F1 and D1: x a^T, and dy b
    out_cols: int  # the columns of y that F and F2 make at a time
    dy_pass: Tile  # D, or D2 above ONE_PASS_RANK
    x_pass: Tile  # X
    x_pass_dropout: Tile  # X under a mask, which takes registers of its own
    # most chunks of rows in D and X: their partial sums, and so their bits, hang on no SM count
    chunks: int = 16
    gemm: GemmTile = GemmTile(0, 0, 0, 0, 0)  # G


@dataclass(frozen=True)
class Device:
    """What the choice of tiles and grids needs to know of a device."""

    arch: str  # "sm_90", "gfx942", ..., or "interpreter"
    multiprocessors: int
    name: str = ""

    @property
    def has_tf32(self) -> bool:
        return self.arch.startswith("sm_")


def padded_rank(r: int) -> int:
    """Return ``r`` padded to a power of two that a tensor core takes: at least 16."""
    return max(RANKS[0], 1 << (r - 1).bit_length())


def _row(project, out_cols, dy_pass, x_pass, x_pass_dropout, chunks=16) -> Tiles:
    tiles = (Tile(*shape) for shape in (dy_pass, x_pass, x_pass_dropout))
    return Tiles(Tile(*project), out_cols, *tiles, chunks)


_LARGE_16BIT = {  # 163 KB of shared memory and more: sm_80, sm_90, sm_100
    16: _row((64, 128, 4, 4), 128, (32, 512, 8, 3), (64, 256, 8, 3), (32, 128, 4, 3)),
    32: _row((64, 128, 4, 4), 128, (64, 256, 8, 2), (64, 128, 4, 3), (32, 128, 4, 3)),
    64: _row((64, 128, 4, 3), 128, (64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3), 8),
    128: _row((128, 128, 8, 3), 64, (32, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 3), 8),
}
# IEEE products of float32 run without tensor cores, from registers that hold whole rows of an
# operand. At rank 128 that leaves X 16 rows, where it adds to dx.
_LARGE_32BIT = {
    16: _row((64, 64, 8, 3), 64, (32, 128, 4, 3), (32, 128, 4, 3), (32, 64, 8, 3)),
    32: _row((64, 64, 8, 3), 64, (32, 64, 4, 3), (32, 64, 4, 3), (16, 32, 4, 3)),
    64: _row((32, 64, 8, 3), 32, (32, 64, 8, 3), (32, 64, 8, 3), (16, 32, 8, 3), 8),
    128: _row((32, 32, 8, 3), 32, (32, 32, 8, 3), (16, 32, 8, 3), (16, 16, 4, 2), 8),
}
_SMALL_16BIT = {  # within 64 KB: any other GPU
    16: _row((64, 64, 4, 3), 64, (32, 256, 8, 2), (32, 128, 4, 2), (32, 128, 4, 2)),
    32: _row((64, 64, 8, 2), 64, (64, 128, 8, 2), (32, 128, 4, 2), (32, 128, 4, 2)),
    64: _row((64, 64, 8, 2), 64, (32, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2)),
    128: _row((64, 64, 8, 2), 64, (32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
}
# 4 wavefronts have twice the registers each that 8 have. With more rows at rank 32 D takes so many that a SIMD unit has
# one wavefront alone, where with 16 it has three.
_AMD_16BIT = {
    16: _row((64, 64, 4, 2), 64, (32, 128, 4, 2), (32, 128, 4, 2), (32, 64, 4, 2)),
    32: _row((64, 64, 4, 2), 64, (16, 128, 4, 2), (32, 128, 4, 2), (32, 64, 4, 2)),
    64: _row((64, 64, 4, 2), 64, (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    128: _row((64, 64, 8, 2), 64, (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
}
_SMALL_32BIT = {
    16: _row((32, 64, 8, 3), 64, (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
    32: _row((32, 32, 8, 3), 32, (32, 64, 8, 2), (32, 64, 8, 2), (16, 32, 4, 2)),
    64: _row((32, 32, 4, 3), 32, (32, 64, 8, 2), (32, 64, 8, 2), (16, 32, 8, 3)),
    128: _row((32, 32, 8, 3), 32, (32, 32, 8, 2), (16, 32, 8, 2), (16, 16, 4, 2)),
}
_AMD_32BIT = _SMALL_32BIT | {
    32: replace(_SMALL_32BIT[32], dy_pass=Tile(32, 64, 4, 2)),
    64: replace(_SMALL_32BIT[64], project=Tile(32, 32, 8, 3)),
    128: replace(_SMALL_32BIT[128], project=Tile(32, 32, 4, 3), x_pass=Tile(32, 32, 4, 2)),
}


def _rows(
    rows_16bit: dict[int, Tiles], rows_32bit: dict[int, Tiles], gemm_16bit: dict[int, GemmTile],
    gemm_32bit: dict[int, GemmTile],
) -> dict[tuple[int, int], Tiles]:  # fmt: skip
    of_size = {2: (rows_16bit, gemm_16bit), 4: (rows_32bit, gemm_32bit)}
    return {
        (itemsize, rank): replace(row, gemm=gemms[rank])
        for itemsize, (rows, gemms) in of_size.items()
        for rank, row in rows.items()
    }


# 163 KB of shared memory hold three stages of 128 x 128 in steps of 64, 227 KB three of 128 x 256, 64 KB two of
# 128 x 128 in steps of 32, with the branch's operands at rank 128 of half as many rows. IEEE products of float32 keep
# whole rows of their operands in registers, of the branch's operands all ranks.
_GEMM_16BIT = dict.fromkeys(RANKS, GemmTile(128, 128, 8, 3, 64))
_WIDE_GEMM_16BIT = dict.fromkeys(RANKS, GemmTile(128, 256, 8, 3, 64))
_SMALL_GEMM_16BIT = dict.fromkeys(RANKS, GemmTile(128, 128, 8, 2, 32)) | {128: GemmTile(64, 128, 8, 2, 32)}
_HIGH_RANKS_32BIT = dict.fromkeys((64, 128), GemmTile(32, 32, 8, 3, 32))
_GEMM_32BIT = dict.fromkeys(RANKS, GemmTile(64, 64, 8, 3, 16)) | _HIGH_RANKS_32BIT
_SMALL_GEMM_32BIT = dict.fromkeys(RANKS, GemmTile(64, 64, 8, 2, 16)) | _HIGH_RANKS_32BIT
_INTERPRETER_TILE = Tile(32, 64, 4, 2)  # small, so that tiny test shapes have several tiles and tails

TABLE: dict[str, dict[tuple[int, int], Tiles]] = {
    "sm_80": _rows(
        # Without warp-group products these passes keep more in registers: other tiles spill, or
        # pass 163 KB. A fourth stage with float32 A would leave room for one block alone, here at rank 32 and, under a
        # mask, 16, on sm_90 at rank 32. With 4 warps F spills here at ranks below 32, with 8 in tf32.
        _LARGE_16BIT
        | {
            16: replace(_LARGE_16BIT[16], project=Tile(64, 128, 4, 3)),
            32: replace(_LARGE_16BIT[32], project=Tile(64, 128, 8, 3), x_pass=Tile(64, 256, 8, 3)),
            128: replace(_LARGE_16BIT[128], project=Tile(128, 64, 8, 3), x_pass=Tile(32, 128, 8, 2)),
        },
        _LARGE_32BIT
        | {
            16: replace(_LARGE_32BIT[16], project=Tile(64, 64, 4, 3)),
            32: replace(_LARGE_32BIT[32], x_pass=Tile(32, 32, 4, 3)),
        },
        _GEMM_16BIT,
        _GEMM_32BIT,
    ),
    # The kernels of `project` have two accumulators, one for a segment and one for their sum. In tf32 at ranks 64 and
    # 128 Triton 3.9 would give the pipelined loop of the x pass a buffer too few (docs/backends.md), so it has none. At
    # rank 128 in 16 bits D1 spills two registers: tiles without a spill have fewer rows, for each of which B is read
    # again, or fewer bytes under way.
    "sm_90": _rows(
        _LARGE_16BIT
        | {
            32: replace(_LARGE_16BIT[32], project=Tile(64, 128, 4, 3)),
            128: replace(_LARGE_16BIT[128], project=Tile(128, 64, 8, 4)),
        },
        _LARGE_32BIT
        | {
            32: replace(_LARGE_32BIT[32], project=Tile(64, 64, 8, 2)),
            64: replace(_LARGE_32BIT[64], project=Tile(32, 64, 4, 3), x_pass=Tile(32, 32, 8, 1)),
            128: replace(_LARGE_32BIT[128], x_pass=Tile(16, 32, 8, 1)),
        },
        _WIDE_GEMM_16BIT,
        _GEMM_32BIT,
    ),
    # With 4 warps D1 spills here at rank 64 in 16 bits, with 8 F under a mask in tf32. In float32 at rank 32 F2 does
    # with three stages, and F with more rows; at rank 128 X with three.
    "sm_100": _rows(
        _LARGE_16BIT | {64: replace(_LARGE_16BIT[64], project=Tile(64, 64, 8, 4))},
        _LARGE_32BIT
        | {
            32: replace(_LARGE_32BIT[32], project=Tile(32, 32, 8, 2)),
            64: replace(_LARGE_32BIT[64], project=Tile(32, 32, 4, 3)),
            128: replace(_LARGE_32BIT[128], x_pass=Tile(16, 32, 8, 2)),
        },
        _WIDE_GEMM_16BIT,
        _GEMM_32BIT,
    ),
    "gfx942": _rows(_AMD_16BIT, _AMD_32BIT, _SMALL_GEMM_16BIT, _SMALL_GEMM_32BIT),
    DEFAULT: _rows(_SMALL_16BIT, _SMALL_32BIT, _SMALL_GEMM_16BIT, _SMALL_GEMM_32BIT),
    INTERPRETER: {
        (itemsize, rank): Tiles(
            *(_INTERPRETER_TILE, 64, *(_INTERPRETER_TILE,) * 3), chunks=2, gemm=GemmTile(32, 64, 4, 2, 32)
        )
        for itemsize in (2, 4)
        for rank in RANKS
    },
}
# Architectures whose tiles are those of another: sm_103 is a larger sm_100.
_SAME_AS = {"sm_103": "sm_100"}


def table_tiles(arch: str, itemsize: int, r: int) -> Tiles:
    """Return the row of the table for ``arch``, or the default row where it has none."""
    return TABLE.get(_SAME_AS.get(arch, arch), TABLE[DEFAULT])[itemsize, padded_rank(r)]


@functools.lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """Return what is known of a torch device; a CPU tensor belongs to Triton's interpreter."""
    if device.type == "cpu":
        return Device(INTERPRETER, 1, INTERPRETER)
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return Device("xpu", properties.gpu_subslice_count, properties.name)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Device(arch, properties.multi_processor_count, properties.name)
