"""The launches of a ragged call are those of passes.py, with kernels that find the group of their rows."""

from dataclasses import replace
from typing import Any, NamedTuple

import triton
from torch import Tensor

from afa_kernels.backend.triton import ragged_backward_kernels, ragged_forward_kernels
from afa_kernels.backend.triton.configs import Tile, Tiles
from afa_kernels.backend.triton.launch import Context, Kernels, Split
from afa_kernels.operator.options import Spec

# From so many programs per multiprocessor on, X and D have one for each group and slab of columns; below, one for each
# chunk of a group's rows, whose partial sums cost memory traffic.
_PROGRAMS_PER_MULTIPROCESSOR = 2


class Groups(NamedTuple):
    """The owners of rows and what each computes with, as the kernels take it."""

    offsets: Tensor
    ranks: Tensor | None
    alpha_t: Tensor | None
    scaling: Tensor | None


class RaggedContext(Context):
    """A :class:`Context` with ``a (G, r, K)`` and ``b (G, N, r)``."""

    kernels = Kernels(
        ragged_forward_kernels.ragged_pack_kernel,
        ragged_forward_kernels.ragged_xa_phi_hb_forward_kernel,
        ragged_forward_kernels.ragged_project_partial_kernel,
        ragged_forward_kernels.ragged_phi_hb_forward_kernel,
        ragged_backward_kernels.ragged_dy_pass_backward_kernel,
        ragged_backward_kernels.ragged_dyb_dphi_backward_kernel,
        ragged_backward_kernels.ragged_x_pass_backward_kernel,
        ragged_backward_kernels.ragged_dphi_backward_kernel,
        ragged_backward_kernels.ragged_weight_gradients_kernel,
    )

    def __init__(
        self, x: Tensor, a: Tensor, b: Tensor, groups: Groups, seed: Tensor | None, spec: Spec,
        tiles: Tiles | None = None,
    ):  # fmt: skip
        self.groups = a.shape[:1]
        self.ends = groups.offsets.contiguous()
        self.ranks = None if groups.ranks is None else groups.ranks.contiguous()
        self.scalings = groups.scaling
        super().__init__(x, a, b, groups.alpha_t, seed, spec, tiles)

    def operand_a(self) -> dict[str, Any]:
        return super().operand_a() | {"stride_ag": self.a.stride(0)}

    def operand_b(self) -> dict[str, Any]:
        return super().operand_b() | {"stride_bg": self.b.stride(0)}

    def small_operand(self, name: str) -> dict[str, Any]:
        arguments = super().small_operand(name)
        return arguments | {"stride_group": arguments["small_ptr"].stride(0)}

    def own_rank_step(self) -> int:
        return super().own_rank_step() if self.ranks is None else 1

    def row_groups(self) -> dict[str, Any]:
        return {"M": self.rows, "G": self.groups[0], "ends_ptr": self.ends, "ranks_ptr": self.ranks}

    def alpha(self) -> dict[str, Any]:
        return {"alpha_ptr": self.alpha_t, "stride_alpha": 0 if self.alpha_t is None else self.alpha_t.stride(0)}

    def scaling(self) -> dict[str, Any]:
        return super().scaling() | self._scalings()

    def factor(self) -> dict[str, Any]:
        return super().factor() | self._scalings() | {"threshold": self.spec.dropout}

    def _scalings(self) -> dict[str, Any]:
        stride = 0 if self.scalings is None else self.scalings.stride(0)
        return {"scaling_ptr": self.scalings, "stride_scaling": stride}

    def x_tile(self) -> Tile:
        """The tile of X with half its columns: a second accumulator takes the registers of the other half."""
        tile = super().x_tile()
        return replace(tile, cols=tile.cols // 2)

    def split(self, tile: Tile, slabs: int) -> Split:
        parts = 1
        if slabs * self.groups[0] < _PROGRAMS_PER_MULTIPROCESSOR * self.device.multiprocessors:
            parts = min(self.tiles.chunks, triton.cdiv(self.rows, tile.rows))
        arguments = {"r": self.r, "parts": parts} | self._chunks(parts)
        return Split((self.groups[0] + 1) * parts, self.groups[0] * parts, arguments)

    def _chunks(self, parts: int, suffix: str = "") -> dict[str, int]:
        chunks = self.tiles.chunks
        return {"chunks": chunks, f"chunks_per_part{suffix}": chunks if parts == 1 else 1}

    def reduction(self, da_partial: Tensor | None, db_partial: Tensor | None) -> dict[str, Any]:
        arguments = self.row_groups()
        for suffix, partial, tile in (("_a", da_partial, self.x_tile()), ("_b", db_partial, self.dy_tile())):
            parts = 1 if partial is None else partial.shape[0] // self.groups[0]
            arguments |= {f"parts{suffix}": parts, f"rows_per_tile{suffix}": tile.rows} | self._chunks(parts, suffix)
        return arguments

    def adding(self, adds_dx: bool) -> dict[str, Any]:
        return {"ADDS_DX": adds_dx}

    def row_tiles(self, rows_per_tile: int) -> int:
        """The most numbers that tiles may have (ragged_functions.py)."""
        return self.rows // rows_per_tile + self.groups[0] + 1

    def packing(self) -> dict[str, Any]:
        return super().packing() | self.row_groups()
