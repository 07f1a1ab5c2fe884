"""From checked operands to kernel launches: grids, strides, workspace.

Workspace comes from torch's allocator at each call, so that two streams never share it and a CUDA
graph owns its own.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from afa_kernels.backend.interface import Rows
from afa_kernels.backend.triton import configs, forward_kernels
from afa_kernels.backend.triton.configs import Device, Tile, Tiles, padded_rank
from afa_kernels.operator.dropout import COLUMNS_PER_CALL
from afa_kernels.operator.options import Spec

_PACK_BLOCK = 1024
ELEMENTWISE = Tile(0, 0, 4, 1)  # warps and stages of a kernel without a streamed product
# Rows per multiprocessor from which one pass over x has enough bytes in flight: a tile of 64 on
# three of four. A tile of 128 rows occupies half as many, with twice the bytes.
_FULL_DEVICE_ROWS = 48
# From so many programs per multiprocessor on, X and D have one for each owner and slab of columns; below, one for each
# chunk of an owner's rows, whose partial sums cost memory traffic.
_PROGRAMS_PER_MULTIPROCESSOR = 2
# The sums over K and N: at most so many segments, each a whole number of so many columns, as in csrc/cuda/host/plan.h.
_MAX_SEGMENTS, _SEGMENT_UNIT = 8, 256


class Launch(NamedTuple):
    """One kernel launch as data: what runs, and what the machine-code report and the traffic model
    read."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def options(self) -> dict[str, Any]:
        # Fused multiply-adds are Triton's default up to 3.9, which warns where they are not asked
        # for.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


class _Recording(NamedTuple):
    device: Device
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("afa_kernels_triton_recording", default=None)


@contextlib.contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Collect the launches for ``device`` instead of running them; tensors may be on torch's meta
    device."""
    launches: list[Launch] = []
    token = _recording.set(_Recording(device, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def submit(kernel: Any, grid: tuple[int, ...], arguments: dict, constants: dict, tile: Tile) -> None:
    """Run a kernel with the warps and stages of ``tile``, or record it."""
    launch = Launch(kernel, grid, arguments, constants, tile.warps, tile.stages)
    recorder = _recording.get()
    if recorder is None:
        launch.run()
    else:
        recorder.launches.append(launch)


def device_of(x: Tensor) -> Device:
    """Return the device for which the launches of a call with input ``x`` are made."""
    recorder = _recording.get()
    return configs.device_of(x.device) if recorder is None else recorder.device


class Split(NamedTuple):
    """How a pass over rows with a sum over them is split."""

    programs: int
    partials: int
    arguments: dict[str, int | None]  # of the pass


class Context:
    """What every launch of one call shares: operands made ready for the kernels, tiles (by default
    those of the table), and constants. With ``rows``, ``a`` is (G, r, K), ``b`` (G, N, r) and ``alpha_t`` (G,)."""

    def __init__(
        self, x: Tensor, a: Tensor, b: Tensor, alpha_t: Tensor | None, seed: Tensor | None, spec: Spec,
        tiles: Tiles | None = None, rows: Rows | None = None,
    ):  # fmt: skip
        self.device = device_of(x)
        self.rows, self.k = x.shape
        self.n, self.r = b.shape[-2:]
        self.owners = a.shape[:-2]  # (G,), or () where one owner has all rows
        ends, ranks, self.scalings = (None, None, None) if rows is None else rows
        self.ends, self.ranks = (None if t is None else t.contiguous() for t in (ends, ranks))
        self.padded = padded_rank(self.r)
        self.dtype = x.dtype
        self.tiles = tiles or configs.table_tiles(self.device.arch, x.element_size(), self.r)
        self.precision = "tf32" if x.dtype == torch.float32 and self.device.has_tf32 and allows_tf32() else "ieee"
        self.act = spec.activation
        self.spec, self.alpha_t, self.seed = spec, alpha_t, seed if spec.dropout else None
        self.x = addressable(x)
        self.a, self.b = (t if int32_offsets(t) else t.contiguous() for t in (a, b))
        # How many ranks of b, which lie side by side, the kernels may take together: a power of two, up to R, that
        # divides the rank and the distance of the rows of b.
        self.rank_step = math.gcd(self.padded, self.r, self.b.stride(-2)) if self.ranks is None else 1
        if self.packing_needed():
            self.a, self.b = self._pack()
            self.rank_step = self.padded

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def dots(self) -> dict[str, Any]:
        """The constants of every kernel with a product."""
        return {"R": self.padded, "RANK_STEP": self.rank_step, "PRECISION": self.precision}

    def mask(self) -> dict[str, Any]:
        """The arguments of a dropout mask."""
        return {
            "seed_ptr": self.seed,
            "threshold": self.spec.dropout,
            "calls_per_row": -(-self.k // COLUMNS_PER_CALL),
        }

    def per_owner(self, t: Tensor | None) -> int | None:
        """Return the stride from what one owner has in ``t`` to what the next one has."""
        return t.stride(0) if self.owners and t is not None else None

    def operand_a(self) -> dict[str, Any]:
        a = self.a
        return {"a_ptr": a, "stride_ag": self.per_owner(a), "stride_ar": a.stride(-2), "stride_ak": a.stride(-1)}

    def operand_b(self) -> dict[str, Any]:
        b = self.b
        return {"b_ptr": b, "stride_bg": self.per_owner(b), "stride_bn": b.stride(-2), "stride_br": b.stride(-1)}

    def small_operand(self, name: str) -> dict[str, Any]:
        """The arguments of a product that takes a, or b transposed, by the name of its operand."""
        t, rank, column = (self.a, -2, -1) if name == "a" else (self.b, -1, -2)
        return {
            "small_ptr": t, "r": self.r, "stride_owner": self.per_owner(t), "stride_rank": t.stride(rank),
            "stride_small": t.stride(column),
        }  # fmt: skip

    def whose_rows(self) -> dict[str, Any]:
        """The arguments by which a program finds its rows."""
        count = self.owners[0] if self.owners else None
        return {"M": self.rows, "G": count, "ends_ptr": self.ends, "ranks_ptr": self.ranks}

    def alpha(self) -> dict[str, Any]:
        return {"alpha_ptr": self.alpha_t, "stride_alpha": self.per_owner(self.alpha_t)}

    def scaling(self) -> dict[str, Any]:
        return {"scaling": self.spec.scaling} | self._scalings()

    def factor(self) -> dict[str, Any]:
        """The arguments of what dz is scaled by."""
        factor = self.spec.scaling * self.spec.inverse_keep
        threshold = None if self.scalings is None else self.spec.dropout
        return {"factor": factor, "threshold": threshold} | self._scalings()

    def _scalings(self) -> dict[str, Any]:
        return {"scaling_ptr": self.scalings, "stride_scaling": self.per_owner(self.scalings)}

    def split(self, tile: Tile, slabs: int) -> Split:
        """Return how a pass over rows in ``slabs`` slabs of columns is split, whose sum over rows is."""
        row_tiles = triton.cdiv(self.rows, tile.rows)
        most = min(row_tiles, self.tiles.chunks)
        if not self.owners:
            tiles_per_chunk = triton.cdiv(row_tiles, most)
            chunks = triton.cdiv(row_tiles, tiles_per_chunk)
            arguments = {"rows_per_chunk": tiles_per_chunk * tile.rows, "parts": None} | self._chunks(chunks)
            return Split(chunks, chunks, arguments)
        owners = self.owners[0]
        fills_device = slabs * owners >= _PROGRAMS_PER_MULTIPROCESSOR * self.device.multiprocessors
        parts = 1 if fills_device else most
        arguments = {"rows_per_chunk": None, "parts": parts} | self._chunks(parts)
        return Split((owners + 1) * parts, owners * parts, arguments)

    def _chunks(self, parts: int, suffix: str = "") -> dict[str, int | None]:
        """How many chunks the rows of an owner are cut into, and how many of them are a part."""
        if not self.owners:
            return {"chunks": None, f"chunks_per_part{suffix}": None}
        chunks = self.tiles.chunks
        return {"chunks": chunks, f"chunks_per_part{suffix}": chunks if parts == 1 else 1}

    def reduction(self, da_partial: Tensor | None, db_partial: Tensor | None) -> dict[str, Any]:
        """The arguments by which partial sums over rows are summed."""
        arguments = self.whose_rows()
        for suffix, partial, tile in (("_a", da_partial, self.x_tile()), ("_b", db_partial, self.dy_tile())):
            parts = 0 if partial is None else partial.shape[0] // math.prod(self.owners)
            rows_per_tile = tile.rows if self.owners else None
            arguments |= {f"parts{suffix}": parts, f"rows_per_tile{suffix}": rows_per_tile}
            arguments |= self._chunks(parts, suffix)
        return arguments

    def dy_tile(self) -> Tile:
        return self.tiles.dy_pass

    def x_tile(self) -> Tile:
        """The tile of X; by owner with half its columns: a second accumulator takes the registers of the other half."""
        tile = self.tiles.x_pass_dropout if self.spec.dropout else self.tiles.x_pass
        return replace(tile, cols=tile.cols // 2) if self.owners else tile

    def row_tiles(self, rows_per_tile: int) -> int:
        """Return the most numbers that tiles of rows may have (``find_tile`` in device_functions.py)."""
        if self.owners:
            return self.rows // rows_per_tile + self.owners[0] + 1
        return triton.cdiv(self.rows, rows_per_tile)

    def row_programs(self) -> int:
        return self.row_tiles(self.tiles.project.rows)

    def spread(self, steps: int) -> tuple[int, int]:
        """Return (programs, steps per program) for the columns of y: enough programs for each tile of rows to give the
        device two waves."""
        wanted = min(steps, triton.cdiv(2 * self.device.multiprocessors, self.row_programs()))
        per_program = triton.cdiv(steps, wanted)
        return triton.cdiv(steps, per_program), per_program

    def one_program(self, length: int) -> bool:
        """Whether one program goes through all ``length`` columns of a tile of rows: where the rows alone fill the
        device, or there is one segment. Elsewhere each segment has a program; the bits are the same."""
        return self.rows >= _FULL_DEVICE_ROWS * self.device.multiprocessors or length <= segment_columns(length)

    def segment_tiles(self, length: int) -> int:
        return segment_columns(length) // self.tiles.project.cols

    def packing_needed(self) -> bool:
        """Whether the kernels are to read rounded copies of a and b."""
        return self.padded > configs.UNPACKED_RANK and not (
            self.rank_step == self.padded and all(t.dtype == self.dtype and t.stride(-1) == 1 for t in (self.a, self.b))
        )

    def _pack(self) -> tuple[Tensor, Tensor]:
        a_padded = self.empty(*self.owners, self.padded, self.k, dtype=self.dtype)
        b_padded = self.empty(*self.owners, self.n, self.padded, dtype=self.dtype)
        blocks_a, blocks_b = (triton.cdiv(length * self.padded, _PACK_BLOCK) for length in (self.k, self.n))
        arguments = {
            "a_padded_ptr": a_padded, "b_padded_ptr": b_padded, "blocks_a": blocks_a, "K": self.k, "N": self.n,
            "r": self.r, **self.operand_a(), **self.operand_b(), **self.whose_rows(),
        }  # fmt: skip
        constants = {"R": self.padded, "BLOCK": _PACK_BLOCK}
        submit(forward_kernels.pack_kernel, (blocks_a + blocks_b, *self.owners), arguments, constants, ELEMENTWISE)
        return a_padded, b_padded


def segment_columns(length: int) -> int:
    """Return how many columns of a sum over ``length`` columns are summed for themselves. It depends on the length
    alone, so that a row has the same bits in a call of any number of rows."""
    return triton.cdiv(triton.cdiv(length, _SEGMENT_UNIT), _MAX_SEGMENTS) * _SEGMENT_UNIT


def int32_offsets(t: Tensor, rows: int | None = None) -> bool:
    """Whether the offsets inside ``rows`` rows of ``t`` (all, by default) fit in int32; of one matrix where t has
    several."""
    rows = t.shape[-2] if rows is None else rows
    return rows * t.stride(-2) + t.shape[-1] * t.stride(-1) < 2**31


def addressable(t: Tensor) -> Tensor:
    """Return ``t``, copied where its columns are not side by side: the kernels stream rows. The
    offset of a tile of rows is int64, offsets inside the tile are int32."""
    fits = t.stride(1) == 1 and int32_offsets(t, configs.MAX_TILE_ROWS)
    return t if fits else t.contiguous()


def allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # torch 2.9 brought fp32_precision; where a caller uses it, reading allow_tf32 raises.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
