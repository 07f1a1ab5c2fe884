"""A model of memory traffic: bytes and FLOPs of every Triton launch from its shapes, and the time that follows.

Every figure here is modelled, none was measured. The bytes of our launches are those that the compiled kernels move for
sm_80 and sm_90, as counted on the PTX machine; python_tests/gpu/test_triton_traffic.py holds the formulas to them.

    time of a kernel = max(HBM / 3.0 TB/s, (HBM + L2) / 5.5 TB/s, FLOP / 450 TFLOP/s) + 2 us
    overhead         = time of all that is not the frozen layer's GEMM / time of that GEMM

HBM counts the large operands, x, dy, y, dx and a full base, and z; everything else (a, b, dz,
partial sums, and every repeated read) counts as L2. The GEMM that accumulates into y reads it
behind its products, which is counted as free.
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from torch import Tensor
from triton import cdiv

from afa_kernels.backend.triton.configs import Device
from afa_kernels.backend.triton.launch import Launch
from bench.model.cuda_launches import H100 as ASSUMED


class Gpu(NamedTuple):
    """Rates of the model: for an H100 the middle of what cuda_launches assumes of one."""

    hbm: float  # bytes per second
    all_memory: float  # bytes per second through L2
    skinny: float  # FLOP/s of a kernel with a small rank
    gemm: float  # FLOP/s of the frozen layer's GEMM
    launch: float  # seconds
    device: Device


H100 = Gpu(
    *(fmean(assumed) for assumed in (ASSUMED.memory, ASSUMED.l2)), 450e12, ASSUMED.gemm, fmean(ASSUMED.launch),
    Device("sm_90", ASSUMED.card.multiprocessors, ASSUMED.card.name),
)  # fmt: skip


class Access(NamedTuple):
    """Bytes that a launch reads and writes through one of its arguments."""

    read: int = 0
    written: int = 0


class Cost(NamedTuple):
    """What one kernel moves and computes."""

    name: str
    hbm: int
    l2: int
    flops: int

    def seconds(self, gpu: Gpu) -> float:
        rate = gpu.gemm if self.name == GROUPED_GEMM else gpu.skinny
        return gpu.launch + max(self.hbm / gpu.hbm, (self.hbm + self.l2) / gpu.all_memory, self.flops / rate)


GROUPED_GEMM = "grouped_gemm_kernel"
Elements = tuple[dict[str, int], dict[str, int]]  # read and written, by argument
# What a program reads to find its rows, and what they compute with, and a bias, which each warp reads for itself; not
# counted by owner.
FINDING = frozenset({"ends_ptr", "ranks_ptr", "alpha_ptr", "scaling_ptr", "seed_ptr", "bias_ptr"})
_HBM = frozenset({
    "x_ptr", "y_ptr", "base_ptr", "dy_ptr", "dx_ptr", "z_ptr", "left_ptr", "weight_ptr", "out_ptr",
})  # fmt: skip


def _bytes(t: Tensor | None, elements: int) -> int:
    return 0 if t is None else elements * t.element_size()


def accesses(launch: Launch) -> dict[str, Access]:
    """Return the bytes that the whole grid of a launch reads and writes, by argument, masked lanes
    left out. What several lanes of a warp read at once counts once; each warp reads a scalar for
    itself. Those of owners depend on their rows: the offsets of such a launch have values, and what finds them
    (FINDING) is left out."""
    tensors = launch.arguments
    read, written = _ELEMENTS[launch.name](launch)
    found = {}
    for name in read.keys() | written.keys():
        access = Access(_bytes(tensors[name], read.get(name, 0)), _bytes(tensors[name], written.get(name, 0)))
        if access != Access():
            found[name] = access
    return found


def _present(launch: Launch, name: str) -> bool:
    return launch.arguments[name] is not None


def _owned(launch: Launch) -> list[tuple[int, int]]:
    """Return the rows and the rank of each owner that has rows."""
    arguments = launch.arguments
    if arguments["ends_ptr"] is None:
        return [(arguments["M"], arguments["r"])]
    ends, ranks = arguments["ends_ptr"].tolist(), arguments["ranks_ptr"]
    ranks = [arguments["r"]] * len(ends) if ranks is None else ranks.tolist()
    each = zip([0, *ends], ends, ranks, strict=False)
    return [(end - start, rank) for start, end, rank in each if end > start]


def _branches(launch: Launch) -> list[tuple[int, int]]:
    """Return the rows and the rank of each owner that has both."""
    return [(rows, rank) for rows, rank in _owned(launch) if rank > 0]


def _own(launch: Launch) -> int:
    """Return how many rows have a branch."""
    return sum(rows for rows, _ in _branches(launch))


def _own_ranks(launch: Launch) -> int:
    """Return how many values z has: those of the rows of each owner, of its own rank."""
    return sum(rows * rank for rows, rank in _branches(launch))


def _tiles(launch: Launch) -> list[int]:
    return [cdiv(rows, launch.constants["BLOCK_M"]) for rows, _ in _branches(launch)]


def _parts(launch: Launch, rows_per_tile: int, chunks_per_part: int) -> list[int]:
    """Return how many programs of a slab have rows of each owner (``parts_with_rows`` in device_functions.py)."""
    tiles = [cdiv(rows, rows_per_tile) for rows, _ in _branches(launch)]
    return [cdiv(each, chunks_per_part * cdiv(each, launch.arguments["chunks"])) for each in tiles]


def _parts_of_pass(launch: Launch) -> list[int]:
    if not _present(launch, "ends_ptr"):
        return [launch.grid[1]]
    return _parts(launch, launch.constants["BLOCK_M"], launch.arguments["chunks_per_part"])


def _read(launch: Launch, programs: list[int]) -> int:
    """Return how many rows of a, or columns of b, so many programs of each owner read: those of a packed copy are R."""
    constants = launch.constants
    packed = constants["RANK_STEP"] == constants["R"]
    ranks = [constants["R"] if packed else rank for _, rank in _branches(launch)]
    return sum(count * rank for count, rank in zip(programs, ranks, strict=True))


def _scalar(launch: Launch, name: str) -> dict[str, int]:
    """Return how often alpha_t or the seed is read: once by each warp. By owner it is left out, with all that a program
    reads to find its rows."""
    return {} if _present(launch, "ends_ptr") else {name: math.prod(launch.grid) * launch.warps}


def _y(launch: Launch) -> Elements:
    if not _present(launch, "y_ptr"):
        return {}, {}
    m, n = launch.arguments["M"], launch.arguments["N"]
    read = {"b_ptr": _read(launch, _tiles(launch)) * n, "base_ptr": m * n}
    return read | _scalar(launch, "alpha_ptr"), {"y_ptr": m * n}


def _forward(launch: Launch) -> Elements:
    k = launch.arguments["K"]
    read, written = _y(launch)
    read |= {"x_ptr": _own(launch) * k, "a_ptr": _read(launch, _tiles(launch)) * k} | _scalar(launch, "seed_ptr")
    return read, written | {"z_ptr": launch.arguments["M"] * launch.arguments["r"]}


def _project_partial(launch: Launch) -> Elements:
    length, rank = launch.arguments["length"], launch.constants["R"]
    read = {"left_ptr": _own(launch) * length, "small_ptr": _read(launch, _tiles(launch)) * length}
    if launch.constants["DROPOUT"]:
        read |= _scalar(launch, "seed_ptr")
    return read, {"partial_ptr": launch.grid[1] * _own(launch) * rank}


def _phi_hb(launch: Launch) -> Elements:
    arguments, columns = launch.arguments, launch.grid[1]
    read, written = _y(launch)
    read |= {"partial_ptr": columns * arguments["segments"] * _own_ranks(launch)}
    return read, written | {"z_ptr": arguments["M"] * arguments["r"]}


def _dz(launch: Launch) -> Elements:
    own = _own(launch)
    read = {"z_ptr": own * launch.arguments["r"]} | _scalar(launch, "alpha_ptr")
    return read, {"dz_ptr": own * launch.constants["R"]}


def _dyb_dphi(launch: Launch) -> Elements:
    n, (read, written) = launch.arguments["N"], _dz(launch)
    return read | {"dy_ptr": _own(launch) * n, "b_ptr": _read(launch, _tiles(launch)) * n}, written


def _dphi(launch: Launch) -> Elements:
    read, written = _dz(launch)
    return read | {"partial_ptr": launch.arguments["count"] * _own_ranks(launch)}, written


def _dy_pass(launch: Launch) -> Elements:
    arguments, rank, slabs, own = launch.arguments, launch.constants["R"], launch.grid[0], _own(launch)
    n, parts = arguments["N"], _parts_of_pass(launch)
    read = {"dy_ptr": own * n}
    if _present(launch, "dh_ptr"):
        read["b_ptr"] = _read(launch, parts) * n
    if _present(launch, "db_ptr"):
        read |= {"z_ptr": slabs * own * arguments["r"]} | _scalar(launch, "alpha_ptr")
    return read, {"dh_ptr": slabs * own * rank, "db_ptr": sum(parts) * rank * n}


def _x_pass(launch: Launch) -> Elements:
    arguments, rank, slabs, own = launch.arguments, launch.constants["R"], launch.grid[0], _own(launch)
    k, parts = arguments["K"], _parts_of_pass(launch)
    read = {"dz_ptr": slabs * own * rank} | _scalar(launch, "seed_ptr")
    if _present(launch, "dx_ptr"):
        read["a_ptr"] = _read(launch, parts) * k
    if _present(launch, "da_ptr"):
        read["x_ptr"] = own * k
    rows_of_dx = arguments["M"]
    if launch.constants["ADDS_DX"]:
        rows_of_dx = own
        read["dx_ptr"] = own * k
    return read, {"dx_ptr": rows_of_dx * k, "da_ptr": sum(parts) * rank * k}


def _weight_gradients(launch: Launch) -> Elements:
    arguments, rank = launch.arguments, launch.constants["R"]
    read, written = {}, {}
    for name, suffix, width in (("da", "_a", arguments["K"]), ("db", "_b", arguments["N"])):
        parts = [arguments[f"parts{suffix}"]]
        if _present(launch, "ends_ptr"):
            parts = _parts(launch, arguments[f"rows_per_tile{suffix}"], arguments[f"chunks_per_part{suffix}"])
        read[f"{name}_partial_ptr"] = sum(parts) * rank * width
        written[f"{name}_ptr"] = (arguments["G"] or 1) * arguments["r"] * width
    return read, written


def _pack(launch: Launch) -> Elements:
    k, n, rank = launch.arguments["K"], launch.arguments["N"], launch.constants["R"]
    own = [each for _, each in _branches(launch)]
    padded = len(own) * rank
    return {"a_ptr": sum(own) * k, "b_ptr": sum(own) * n}, {"a_padded_ptr": padded * k, "b_padded_ptr": padded * n}


def _grouped_gemm(launch: Launch) -> Elements:
    """Each tile of rows reads the matrix, and B or A; each tile of columns the rows, and z or dz. Rows behind the last
    offset read nothing where each owner has a matrix."""
    arguments, constants = launch.arguments, launch.constants
    length, columns, block = arguments["length"], arguments["columns"], constants["BLOCK_M"]
    owned = [rows for rows, _ in _owned(launch)]
    if arguments["stride_matrix"] is None and arguments["M"] > sum(owned):
        owned.append(arguments["M"] - sum(owned))
    across, tiles = cdiv(columns, constants["BLOCK_L"]), sum(cdiv(rows, block) for rows in owned)
    read = {
        "left_ptr": across * sum(owned) * length, "weight_ptr": tiles * length * columns,
        "z_ptr": across * _own_ranks(launch), "small_ptr": _read(launch, _tiles(launch)) * columns,
    }  # fmt: skip
    return read, {"out_ptr": arguments["M"] * columns}


_ELEMENTS: dict[str, Callable[[Launch], Elements]] = {
    "xa_phi_hb_forward_kernel": _forward,
    "project_partial_kernel": _project_partial,
    "phi_hb_forward_kernel": _phi_hb,
    "dyb_dphi_backward_kernel": _dyb_dphi,
    "dphi_backward_kernel": _dphi,
    "dy_pass_backward_kernel": _dy_pass,
    "x_pass_backward_kernel": _x_pass,
    "weight_gradients_kernel": _weight_gradients,
    "pack_kernel": _pack,
    GROUPED_GEMM: _grouped_gemm,
}


def _flops(launch: Launch) -> int:
    arguments, rank = launch.arguments, launch.constants["R"]
    one = 2 * arguments["M"] * rank  # of one product, per column
    name = launch.name
    if name == GROUPED_GEMM:
        return 2 * arguments["M"] * (arguments["length"] + rank) * arguments["columns"]
    if name == "xa_phi_hb_forward_kernel":
        return one * (arguments["K"] + arguments["N"])
    if name == "project_partial_kernel":
        return one * arguments["length"]
    if name in ("phi_hb_forward_kernel", "dyb_dphi_backward_kernel"):
        return one * arguments["N"]
    if name == "dy_pass_backward_kernel":
        return one * arguments["N"] * (_present(launch, "dh_ptr") + _present(launch, "db_ptr"))
    if name == "x_pass_backward_kernel":
        return one * arguments["K"] * (_present(launch, "dx_ptr") + _present(launch, "da_ptr"))
    return 0


def cost(launch: Launch) -> Cost:
    """Return what a launch moves through HBM and through L2 alone, and its FLOPs."""
    hbm = total = 0
    for name, (read, written) in accesses(launch).items():
        tensor = launch.arguments[name]
        total += read + written
        if name in _HBM:
            # Distinct bytes once each; a bias, expanded over the rows, has N of them.
            distinct = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
            hbm += min(read, distinct) + min(written, distinct)
    return Cost(launch.name, hbm, total - hbm, _flops(launch))
