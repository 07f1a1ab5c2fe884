"""A model of memory traffic: bytes and FLOPs of every Triton launch from its shapes, and the adapter tax that follows.

Every figure here is modelled, none was measured. The bytes of our launches are checked against the loads and stores
that Triton's interpreter really makes (python_tests/test_triton_traffic.py); the other implementations are torch ops
recorded from what they run, or, for LoRAFusion, a list of passes read from its published kernels.

    time of a kernel = max(HBM / 3.0 TB/s, (HBM + L2) / 5.5 TB/s, FLOP / 450 TFLOP/s) + 2 us
    tax              = time of all that is not the frozen layer's GEMM / time of that GEMM

HBM counts the large operands, x, dy, y, dx and a full base, and z; everything else (a, b, dz, partial sums, and every
repeated read) counts as L2. The GEMM that accumulates into y reads it behind its products, which is counted as free.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from afa_kernels.backend import torch_ops
from afa_kernels.backend.linear import linear_backward, linear_forward
from afa_kernels.backend.registry import Spec
from afa_kernels.backend.triton.configs import Device
from afa_kernels.backend.triton.launch import Launch
from bench.triton_aot import Problem


class Gpu(NamedTuple):
    """Rates of the model. An H100's copy rate and GEMM rate were measured on such a card; the others are assumed."""

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
    """Return the bytes that the whole grid of a launch reads and writes, by argument, masked lanes left out."""
    tensors = launch.arguments
    read, written = _ELEMENTS[launch.name](launch)
    found = {}
    for name in read.keys() | written.keys():
        access = Access(_bytes(tensors[name], read.get(name, 0)), _bytes(tensors[name], written.get(name, 0)))
        if access != Access():
            found[name] = access
    return found


_Elements = tuple[dict[str, int], dict[str, int]]


def _present(launch: Launch, name: str) -> bool:
    return launch.arguments[name] is not None


def _y_elements(launch: Launch, row_tiles: int) -> _Elements:
    m, n, rank = launch.arguments["M"], launch.arguments["N"], launch.constants["R"]
    if not _present(launch, "y_ptr"):
        return {}, {}
    return {"b_ptr": row_tiles * n * rank, "base_ptr": m * n}, {"y_ptr": m * n}


def _forward(launch: Launch) -> _Elements:
    arguments, rank, tiles = launch.arguments, launch.constants["R"], launch.grid[0]
    m, k = arguments["M"], arguments["K"]
    read, written = _y_elements(launch, tiles)
    read |= {"x_ptr": m * k, "a_ptr": tiles * rank * k, "alpha_ptr": tiles if _present(launch, "y_ptr") else 0}
    return read | {"seed_ptr": tiles}, written | {"z_ptr": m * arguments["r"]}


def _project_partial(launch: Launch) -> _Elements:
    arguments, rank, (tiles, splits) = launch.arguments, launch.constants["R"], launch.grid
    m, length = arguments["M"], arguments["length"]
    read = {"left_ptr": m * length, "small_ptr": tiles * rank * length, "seed_ptr": tiles * splits}
    if not launch.constants["DROPOUT"]:
        del read["seed_ptr"]
    return read, {"partial_ptr": splits * m * rank}


def _phi_hb(launch: Launch) -> _Elements:
    arguments, rank, (tiles, columns) = launch.arguments, launch.constants["R"], launch.grid
    read, written = _y_elements(launch, tiles)
    read |= {"partial_ptr": columns * arguments["splits"] * arguments["M"] * rank}
    read |= {"alpha_ptr": tiles * columns if _present(launch, "y_ptr") else 0}
    return read, written | {"z_ptr": arguments["M"] * arguments["r"]}


def _dyb_dphi(launch: Launch) -> _Elements:
    arguments, rank, tiles = launch.arguments, launch.constants["R"], launch.grid[0]
    m, n = arguments["M"], arguments["N"]
    read = {"dy_ptr": m * n, "b_ptr": tiles * rank * n, "z_ptr": m * arguments["r"], "alpha_ptr": tiles}
    return read, {"dz_ptr": m * rank}


def _dphi(launch: Launch) -> _Elements:
    arguments, rank, tiles = launch.arguments, launch.constants["R"], launch.grid[0]
    m = arguments["M"]
    read = {"partial_ptr": arguments["count"] * m * rank, "z_ptr": m * arguments["r"], "alpha_ptr": tiles}
    return read, {"dz_ptr": m * rank}


def _dy_pass(launch: Launch) -> _Elements:
    arguments, rank, (slabs, chunks) = launch.arguments, launch.constants["R"], launch.grid
    m, n = arguments["M"], arguments["N"]
    read = {"dy_ptr": m * n, "alpha_ptr": slabs * chunks}
    if _present(launch, "dh_ptr"):
        read["b_ptr"] = chunks * rank * n
    if _present(launch, "db_ptr"):
        read["z_ptr"] = slabs * m * arguments["r"]
    return read, {"dh_ptr": slabs * m * rank, "db_ptr": chunks * rank * n}


def _x_pass(launch: Launch) -> _Elements:
    arguments, rank, (slabs, chunks) = launch.arguments, launch.constants["R"], launch.grid
    m, k = arguments["M"], arguments["K"]
    read = {"dz_ptr": slabs * m * rank, "seed_ptr": slabs * chunks}
    if _present(launch, "dx_ptr"):
        read["a_ptr"] = chunks * rank * k
    if _present(launch, "da_ptr"):
        read["x_ptr"] = m * k
    return read, {"dx_ptr": m * k, "da_ptr": chunks * rank * k}


def _weight_gradients(launch: Launch) -> _Elements:
    arguments, rank = launch.arguments, launch.constants["R"]
    k, n, r = arguments["K"], arguments["N"], arguments["r"]
    read = {
        "da_partial_ptr": arguments["chunks_a"] * rank * k,
        "db_partial_ptr": arguments["chunks_b"] * rank * n,
    }
    return read, {"da_ptr": r * k, "db_ptr": n * r}


def _pack(launch: Launch) -> _Elements:
    arguments, rank = launch.arguments, launch.constants["R"]
    k, n, r = arguments["K"], arguments["N"], arguments["r"]
    return {"a_ptr": r * k, "b_ptr": n * r}, {"a_padded_ptr": rank * k, "b_padded_ptr": n * rank}


_ELEMENTS: dict[str, Callable[[Launch], _Elements]] = {
    "xa_phi_hb_forward_kernel": _forward,
    "project_partial_kernel": _project_partial,
    "phi_hb_forward_kernel": _phi_hb,
    "dyb_dphi_backward_kernel": _dyb_dphi,
    "dphi_backward_kernel": _dphi,
    "dy_pass_backward_kernel": _dy_pass,
    "x_pass_backward_kernel": _x_pass,
    "weight_gradients_kernel": _weight_gradients,
    "pack_kernel": _pack,
}


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


class Tax(NamedTuple):
    """Modelled extra time over the frozen GEMMs."""

    implementation: str
    forward: list[Cost]
    backward: list[Cost]
    gemm_slowdown: float = 0.0  # relative to the frozen GEMM, of an implementation that replaces it

    def seconds(self, gpu: Gpu, gemm: float) -> tuple[float, float]:
        extra = self.gemm_slowdown * gemm
        return tuple(sum(c.seconds(gpu) for c in costs) + extra for costs in (self.forward, self.backward))


class _OpCosts(TorchDispatchMode):
    """Record each torch op as a kernel that reads its operands and writes its result once, except the frozen GEMM."""

    _FREE = ("view", "t", "transpose", "expand", "detach", "alias", "unsqueeze", "empty", "empty_like", "permute",
             "_unsafe_view", "empty_strided", "new_empty", "select", "slice")  # fmt: skip
    _WRITES_ONLY = ("copy_", "fill_", "zero_")

    def __init__(self, weight: Tensor):
        super().__init__()
        self._weight_numel = weight.numel()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        operands = [t for t in args if isinstance(t, Tensor)]
        frozen_gemm = name in ("mm", "addmm_", "addmm") and any(t.numel() == self._weight_numel for t in operands[-2:])
        if name not in self._FREE and not frozen_gemm:
            read = operands[1:] if name in self._WRITES_ONLY else operands
            results = result if isinstance(result, (tuple, list)) else (result,)
            moved = sum(self._storage_bytes(t) for t in (*read, *results) if isinstance(t, Tensor))
            self.costs.append(Cost(name, moved, 0, 0))
        return result

    @staticmethod
    def _storage_bytes(t: Tensor) -> int:
        return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _eager_tax(problem: Problem, weight_dtype: torch.dtype, name: str) -> Tax:
    """PEFT's own sequence of ops with the activation in between, and its autograd backward."""
    m, k, n, r = problem.m, problem.k, problem.n, problem.r
    x, weight = _meta(m, k, grad=True), _meta(n, k)
    a, b = _meta(r, k, dtype=weight_dtype, grad=True), _meta(n, r, dtype=weight_dtype, grad=True)
    with _OpCosts(weight) as forward:
        base = F.linear(x, weight)
        z = F.linear(x.to(weight_dtype), a)
        h = 0.7 * z + 0.3 * F.silu(z)
        y = (base + F.linear(h, b) * 2.0).to(x.dtype)
    with _OpCosts(weight) as backward:
        torch.autograd.grad(y, (x, a, b), torch.empty_like(y))
    return Tax(name, forward.costs, backward.costs)


def _torch_backend_tax(problem: Problem) -> Tax:
    m, k, n, r = problem.m, problem.k, problem.n, problem.r
    x, weight, a, b, dy = _meta(m, k), _meta(n, k), _meta(r, k), _meta(n, r), _meta(m, n)
    alpha_t, spec = _meta(dtype=torch.float32), Spec("silu", 2.0, 0)
    with _OpCosts(weight) as forward:
        _, z = linear_forward(torch_ops.BACKEND, x, weight, None, a, b, alpha_t, None, spec, save_z=True)
    with _OpCosts(weight) as backward:
        linear_backward(
            torch_ops.BACKEND, dy, x, weight, a, b, z, alpha_t, None, spec, need_da=True, need_db=True
        )  # fmt: skip
    return Tax("afa_kernels, torch backend", forward.costs, backward.costs)


def _unsloth_tax(problem: Problem) -> Tax:
    """The passes of Unsloth's LoRA_W, with phi and phi' as one op each; it forms dy b twice and x a^T again."""
    mk, mn = 2 * problem.m * problem.k, 2 * problem.m * problem.n
    forward = [_pass("cast a"), _pass("x a^T", mk), _pass("phi"), _pass("cast b"), _pass("y += h b^T", 2 * mn)]
    backward = [
        _pass("cast a"), _pass("cast b"), _pass("x a^T", mk), _pass("phi"), _pass("db", mn), _pass("dy b", mn),
        _pass("phi'"), _pass("da", mk), _pass("dy b", mn), _pass("dx += dz a", 2 * mk),
    ]  # fmt: skip
    return Tax("Unsloth's order of passes", forward, backward)


def _lorafusion_tax(problem: Problem, efficiency: float = 0.95) -> Tax:
    """LoRAFusion's fused GEMM at a share of the plain GEMM's speed, and its dy kernel with float32 atomics into dh."""
    m, k, n, r = problem.m, problem.k, problem.n, problem.r
    mk, mn = 2 * m * k, 2 * m * n
    atomics = 2 * 4 * m * r * -(-n // 64)  # one read-modify-write of dh for every 64 columns of dy
    forward = [_pass("x a^T", mk), _pass("fused GEMM")]
    backward = [_pass("dh, db", mn, atomics), _pass("da", mk), *(_pass("small") for _ in range(5))]
    return Tax(f"LoRAFusion, GEMM at {efficiency:.0%}", forward, backward, (1 + r / k) / efficiency - 1)


def _pass(name: str, hbm: int = 0, l2: int = 0) -> Cost:
    return Cost(name, hbm, l2, 0)


def our_tax(problem: Problem, gpu: Gpu) -> Tax:
    forward = problem.record(gpu.device, passes=("forward",))
    backward = problem.record(gpu.device, passes=("backward",))
    return Tax("afa_kernels, triton backend", [cost(entry) for entry in forward], [cost(entry) for entry in backward])


def taxes(problem: Problem, gpu: Gpu) -> list[Tax]:
    """Return the modelled taxes of the implementations that we compare with, and ours last."""
    return [
        _eager_tax(problem, torch.float32, "PEFT, float32 a and b"),
        _eager_tax(problem, torch.bfloat16, "PEFT, bfloat16 a and b"),
        _unsloth_tax(problem),
        _lorafusion_tax(problem),
        _torch_backend_tax(problem),
        our_tax(problem, gpu),
    ]


def gemm_seconds(problem: Problem, gpu: Gpu) -> float:
    return 2 * problem.m * problem.k * problem.n / gpu.gemm


def percent(tax: Tax, problem: Problem, gpu: Gpu) -> tuple[float, float, float]:
    """Return the modelled tax of the forward, the backward and both, in percent of the frozen layer's GEMMs."""
    gemm = gemm_seconds(problem, gpu)
    forward, backward = tax.seconds(gpu, gemm)
    return 100 * forward / gemm, 100 * backward / gemm, 100 * (forward + backward) / (2 * gemm)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("m", 8192), ("k", 4096), ("n", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--r", type=int, nargs="+", default=[16, 32, 64, 128])
    options = parser.parse_args(arguments)
    print(f"MODELLED, not measured: {H100.name}, bfloat16, M={options.m} K={options.k} N={options.n}, silu, no dropout")
    for r in options.r:
        problem = Problem(options.m, options.k, options.n, r, base=False)
        print(f"\nr={r}: frozen GEMM {gemm_seconds(problem, H100) * 1e6:.1f} us each way (modelled)")
        print(f"{'implementation':30}{'launches':>10}{'HBM MB':>14}{'L2 MB':>12}{'tax fwd':>9}{'bwd':>7}{'both':>7}")
        for tax in taxes(problem, H100):
            forward, backward, both = percent(tax, problem, H100)
            launches = f"{len(tax.forward)}+{len(tax.backward)}"
            hbm, l2 = ("+".join(f"{sum(getattr(c, kind) for c in costs) / 1e6:.0f}" for costs in tax[1:3])
                       for kind in ("hbm", "l2"))  # fmt: skip
            print(
                f"{tax.implementation:30}{launches:>10}{hbm:>14}{l2:>12}{forward:>8.1f}%{backward:>6.1f}%{both:>6.1f}%"
            )
        for entry in our_tax(problem, H100).forward + our_tax(problem, H100).backward:
            print(
                f"    {entry.name.removesuffix('_kernel'):28}{entry.hbm / 1e6:8.1f} MB HBM {entry.l2 / 1e6:8.1f} MB L2 "
                f"{entry.flops / 1e9:7.2f} GFLOP {entry.seconds(H100) * 1e6:7.1f} us"
            )


if __name__ == "__main__":
    main()
