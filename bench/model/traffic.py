"""A model of memory traffic: bytes and FLOPs of every Triton launch from its shapes, and the
time that follows (layer_overhead.py puts it in relation to the frozen layer).

Every figure here is modelled, none was measured. The bytes of our launches are those that the compiled kernels move for
sm_80 and sm_90, as counted on the PTX machine (python_tests/test_triton_traffic.py holds the formulas to the counts);
the other implementations are torch ops recorded from what they run, or, for LoRAFusion, a list of passes read from its
published kernels.

    time of a kernel = max(HBM / 3.0 TB/s, (HBM + L2) / 5.5 TB/s, FLOP / 450 TFLOP/s) + 2 us
    overhead         = time of all that is not the frozen layer's GEMM / time of that GEMM

HBM counts the large operands, x, dy, y, dx and a full base, and z; everything else (a, b, dz,
partial sums, and every repeated read) counts as L2. The GEMM that accumulates into y reads it
behind its products, which is counted as free.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from afa_kernels.backend.triton.configs import Device
from afa_kernels.backend.triton.launch import Launch
from bench.model import ragged_traffic
from bench.model.ragged_traffic import Elements, ranks_read


class Gpu(NamedTuple):
    """Rates of the model. An H100's copy rate and GEMM rate were measured on such a card; the
    others are assumed."""

    name: str
    hbm: float  # bytes per second
    all_memory: float  # bytes per second through L2
    skinny: float  # FLOP/s of a kernel with a small rank
    gemm: float  # FLOP/s of the frozen layer's GEMM
    launch: float  # seconds
    device: Device


H100 = Gpu("H100", 3.0e12, 5.5e12, 450e12, 798e12, 2e-6, Device("sm_90", 132, "H100"))


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
        return gpu.launch + max(
            self.hbm / gpu.hbm, (self.hbm + self.l2) / gpu.all_memory, self.flops / gpu.skinny
        )  # fmt: skip


_HBM = frozenset({"x_ptr", "y_ptr", "base_ptr", "dy_ptr", "dx_ptr", "z_ptr", "left_ptr"})


def _bytes(t: Tensor | None, elements: int) -> int:
    return 0 if t is None else elements * t.element_size()


def accesses(launch: Launch) -> dict[str, Access]:
    """Return the bytes that the whole grid of a launch reads and writes, by argument, masked lanes
    left out. What several lanes of a warp read at once counts once; each warp reads a scalar for
    itself."""
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


def _y_elements(launch: Launch, row_tiles: int) -> Elements:
    m, n = launch.arguments["M"], launch.arguments["N"]
    if not _present(launch, "y_ptr"):
        return {}, {}
    return {"b_ptr": row_tiles * n * ranks_read(launch), "base_ptr": m * n}, {"y_ptr": m * n}


def _forward(launch: Launch) -> Elements:
    arguments, tiles = launch.arguments, launch.grid[0]
    m, k = arguments["M"], arguments["K"]
    read, written = _y_elements(launch, tiles)
    read |= {
        "x_ptr": m * k,
        "a_ptr": tiles * ranks_read(launch) * k,
        "alpha_ptr": tiles * launch.warps if _present(launch, "y_ptr") else 0,
    }
    return read | {"seed_ptr": tiles * launch.warps}, written | {"z_ptr": m * arguments["r"]}


def _project_partial(launch: Launch) -> Elements:
    arguments, rank, (tiles, segments) = launch.arguments, launch.constants["R"], launch.grid
    m, length = arguments["M"], arguments["length"]
    read = {
        "left_ptr": m * length,
        "small_ptr": tiles * ranks_read(launch) * length,
        "seed_ptr": tiles * segments * launch.warps,
    }
    if not launch.constants["DROPOUT"]:
        del read["seed_ptr"]
    return read, {"partial_ptr": segments * m * rank}


def _phi_hb(launch: Launch) -> Elements:
    arguments, rank, (tiles, columns) = launch.arguments, launch.constants["R"], launch.grid
    read, written = _y_elements(launch, tiles)
    read |= {"partial_ptr": columns * arguments["segments"] * arguments["M"] * rank}
    read |= {"alpha_ptr": tiles * columns * launch.warps if _present(launch, "y_ptr") else 0}
    return read, written | {"z_ptr": arguments["M"] * arguments["r"]}


def _dyb_dphi(launch: Launch) -> Elements:
    arguments, rank, tiles = launch.arguments, launch.constants["R"], launch.grid[0]
    m, n = arguments["M"], arguments["N"]
    read = {
        "dy_ptr": m * n,
        "b_ptr": tiles * ranks_read(launch) * n,
        "z_ptr": m * arguments["r"],
        "alpha_ptr": tiles * launch.warps,
    }
    return read, {"dz_ptr": m * rank}


def _dphi(launch: Launch) -> Elements:
    arguments, rank, tiles = launch.arguments, launch.constants["R"], launch.grid[0]
    m = arguments["M"]
    read = {
        "partial_ptr": arguments["count"] * m * rank,
        "z_ptr": m * arguments["r"],
        "alpha_ptr": tiles * launch.warps,
    }
    return read, {"dz_ptr": m * rank}


def _dy_pass(launch: Launch) -> Elements:
    arguments, rank, (slabs, chunks) = launch.arguments, launch.constants["R"], launch.grid
    m, n = arguments["M"], arguments["N"]
    read = {"dy_ptr": m * n}
    if _present(launch, "dh_ptr"):
        read["b_ptr"] = chunks * ranks_read(launch) * n
    if _present(launch, "db_ptr"):
        read |= {"z_ptr": slabs * m * arguments["r"], "alpha_ptr": slabs * chunks * launch.warps}
    return read, {"dh_ptr": slabs * m * rank, "db_ptr": chunks * rank * n}


def _x_pass(launch: Launch) -> Elements:
    arguments, rank, (slabs, chunks) = launch.arguments, launch.constants["R"], launch.grid
    m, k = arguments["M"], arguments["K"]
    read = {"dz_ptr": slabs * m * rank, "seed_ptr": slabs * chunks * launch.warps}
    if _present(launch, "dx_ptr"):
        read["a_ptr"] = chunks * ranks_read(launch) * k
    if _present(launch, "da_ptr"):
        read["x_ptr"] = m * k
    return read, {"dx_ptr": m * k, "da_ptr": chunks * rank * k}


def _weight_gradients(launch: Launch) -> Elements:
    arguments, rank = launch.arguments, launch.constants["R"]
    k, n, r = arguments["K"], arguments["N"], arguments["r"]
    read = {
        "da_partial_ptr": arguments["chunks_a"] * rank * k,
        "db_partial_ptr": arguments["chunks_b"] * rank * n,
    }
    return read, {"da_ptr": r * k, "db_ptr": n * r}


def _pack(launch: Launch) -> Elements:
    arguments, rank = launch.arguments, launch.constants["R"]
    k, n, r = arguments["K"], arguments["N"], arguments["r"]
    return {"a_ptr": r * k, "b_ptr": n * r}, {"a_padded_ptr": rank * k, "b_padded_ptr": n * rank}


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
} | ragged_traffic.ELEMENTS


def _flops(launch: Launch) -> int:
    arguments, rank = launch.arguments, launch.constants["R"]
    one = 2 * arguments.get("M", 0) * rank  # of one product, per column
    name = launch.name
    if name == "xa_phi_hb_forward_kernel":
        return one * (arguments["K"] + (arguments["N"] if _present(launch, "y_ptr") else 0))
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
