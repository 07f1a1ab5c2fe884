"""``make ptx-report``: what the compiled kernels do in one forward and backward, counted on the PTX machine.

For each kernel: instructions that warps issue; bytes of global memory by the width of the access (a lane's, as many
times as lanes ask for them) and through asynchronous copies; pieces of 32 bytes asked of the L2 cache, and how many of
their bytes were wanted; passes over shared memory beyond the fewest possible; barriers; matrix instructions (mma of a
warp, or a warp's part of wgmma). Counts, not time: no GPU is modelled.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict

import ptx_cuda
import torch

from afa_kernels.backend import choice
from afa_kernels.operator.options import Spec

COLUMNS = ("kernel", "launches", "instr.", "loads by width", "stores by width", "copied", "sectors", "wanted",
           "conflicts", "barriers", "mma")  # fmt: skip


def call(backend: str, m: int, k: int, n: int, r: int) -> None:
    """Run a forward and a backward in bfloat16."""
    torch.manual_seed(0)

    def draw(rows: int, cols: int) -> torch.Tensor:
        return torch.randn(rows, cols).to(torch.bfloat16)

    kernels, spec, alpha_t = choice.get(backend), Spec("silu", 1.0), torch.tensor(0.5)
    operands, base, dy = (draw(m, k), draw(r, k), draw(n, r)), draw(m, n), draw(m, n)
    z = kernels.forward(*operands, alpha_t, None, spec, base=base, out=torch.empty_like(base), save_z=True)
    kernels.backward(dy, *operands, z, alpha_t, None, spec, need_dx=True, need_da=True, need_db=True)


def of_nvcc(arch: str, shape: tuple[int, int, int, int]) -> list[tuple[str, dict]]:
    ptx_cuda.register()
    if not ptx_cuda.kernels.status():
        return []
    ptx_cuda._cuda_on_ptx.take_launches()
    with ptx_cuda.kernels.on(ptx_cuda.DEVICES[arch]):
        call(ptx_cuda.NAME, *shape)
    return [(plain_name(launch["kernel"]), launch) for launch in ptx_cuda._cuda_on_ptx.take_launches()]


def plain_name(mangled: str) -> str:
    """Return ``forward_kernel`` of ``_ZN3afa14forward_kernelI...``."""
    rest = mangled.removeprefix("_ZN3afa")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return rest[len(digits) :][: int(digits)]


def of_triton(arch: str, shape: tuple[int, int, int, int]) -> list[tuple[str, dict]]:
    from ptx_triton_driver import simulated

    with simulated(arch) as machine:
        call("triton", *shape)
    return machine.launched


def _widths(counts: Counter) -> str:
    return " ".join(f"{width}:{width * count / 1024:.0f}K" for width, count in sorted(counts.items()) if count) or "-"


def rows(launches: list[tuple[str, dict]]) -> list[tuple[str, ...]]:
    """Return one row per kernel, its launches added up."""
    total: dict[str, Counter] = defaultdict(Counter)
    widths: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for name, counters in launches:
        total[name].update({key: value for key, value in counters.items() if isinstance(value, int)})
        total[name]["launches"] += 1
        total[name]["moved"] += sum(map(sum, counters["traffic"].values()))
        for key in ("global_loads", "global_stores"):
            widths[name, key].update(counters[key])
    found = []
    for name, sums in total.items():
        sectors = sums["read_sectors"] + sums["written_sectors"]
        found.append((
            name, str(sums["launches"]), str(sums["instructions"]), _widths(widths[name, "global_loads"]),
            _widths(widths[name, "global_stores"]), f"{sums['async_copy_bytes'] / 1024:.0f}K", str(sectors),
            f"{sums['moved'] / (32 * max(sectors, 1)):.0%}", str(sums["bank_conflicts"]), str(sums["block_barriers"]),
            str(sums["multiply_adds"] + sums["group_multiply_adds"]),
        ))  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make ptx-report", description=__doc__)
    for name, value in (("m", 256), ("k", 512), ("n", 512), ("r", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: it compiles
    shape = (arguments.m, arguments.k, arguments.n, arguments.r)
    print("COUNTED on the PTX machine, not measured: M={} K={} N={} r={}, bfloat16".format(*shape))
    for compiler, count in (("nvcc", of_nvcc), ("Triton", of_triton)):
        for arch in ("sm_80", "sm_90"):
            table = [COLUMNS, *rows(count(arch, shape))]
            if len(table) == 1:
                print(f"\n{compiler} {arch}: not part of this build")
                continue
            sizes = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
            print(f"\n{compiler} {arch}")
            for row in table:
                print("  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
