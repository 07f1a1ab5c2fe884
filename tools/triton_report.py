"""Compile every row of the Triton tile table for GPUs that are not here, print what the machine
code uses, and check it.

Run as ``python -m tools.triton_report`` (``--quick`` for a subset). Exits with 1 if a kernel spills
beyond what is tolerated, if a product of 16-bit operands has no tensor-core instruction, or if a
kernel takes more shared memory than its architecture has. Registers, spills and instructions are
read from the machine code; nothing here says how fast it runs.
"""

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
import triton

from afa_kernels.backend.interface import Call
from afa_kernels.backend.triton import configs
from afa_kernels.backend.triton.backend import BACKEND
from afa_kernels.backend.triton.launch import Launch
from bench.model.gpus import CARDS
from tools.triton_aot import MachineCode, Problem, compile_launch, compiling_for, device_for, examine, examine_amd

NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
_DEFAULT_SHARED = 64 * 1024  # what the default rows have to fit into, on any GPU
_DROPPED = 26  # of 256
_TOKENS = (16384, 512)  # one pass over x, and the split kernels
# The dtype of a and b (None: that of x), and by how much their rank is below the padded one, which takes masks.
_OPERANDS = {"f32": (torch.float32, 0), "masked": (torch.float32, 1), "as x": (None, 0)}
_OWNERS = (0, 8)  # of rows, each with its own a and b
_PRODUCTS = ("project", "xa_phi", "phi_hb", "dyb", "dy_pass", "x_pass", "grouped_gemm")  # kernels with a matrix product

# Of a row's kernel, with the reason in configs.py.
_TOLERATED_SPILLS = {("sm_90", 2, 128, "dyb_dphi_backward_kernel"): 2}


class Variant(NamedTuple):
    """A row of the table in one use: the same tiles make other kernels with dropout, and of other a
    and b."""

    arch: str
    row: str  # arch, or "default"
    dtype: str
    rank: int
    dropout: int
    rows: int  # M: few rows take the split kernels
    owners: int = 0  # of rows, each with its own a and b; 0: one owner has all rows
    operands: str = "f32"

    def is_taken(self) -> bool:
        problem = Call("meta", _DTYPES[self.dtype], 1, 1, 1, self.rank, "silu", self.dropout > 0)
        return BACKEND.refuses(problem) is None

    def record(self) -> list[Launch]:
        tiles = configs.TABLE[self.row][_DTYPES[self.dtype].itemsize, self.rank]
        weight_dtype, below = _OPERANDS[self.operands]
        problem = Problem(
            m=self.rows,
            r=self.rank - below,
            dtype=_DTYPES[self.dtype],
            dropout=self.dropout,
            owners=self.owners,
            weight_dtype=weight_dtype,
        )
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.dtype == "tf32"
        try:
            launches = problem.record(device_for(self.arch), tiles=tiles)
            if self.owners:
                adding = replace(problem, adds_dx=True)
                launches += adding.record(device_for(self.arch), tiles=tiles, forward=False)
                launches += replace(problem, matrices=self.owners).record(device_for(self.arch), tiles=tiles)
            return launches
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


class Row(NamedTuple):
    variant: Variant
    launch: Launch
    code: MachineCode
    faults: list[str]


def variants(
    archs: Collection[str], dtypes: Collection[str] = tuple(_DTYPES), quick: bool = False
) -> Iterator[Variant]:
    """Yield every use of every row that the backend takes; with ``quick`` bfloat16 alone, at ranks
    16 and 64 on sm_90 and 16 elsewhere."""
    for arch in archs:
        rows = (arch,) if arch in AMD else (arch, configs.DEFAULT)
        for use in itertools.product(rows, dtypes, configs.RANKS, (0, _DROPPED), _TOKENS, _OWNERS):
            for operands in _operands(*use[1:3], use[-1]):
                variant = Variant(arch, *use, operands)
                if variant.is_taken() and not (quick and not _is_quick(variant)):
                    yield variant


def _operands(dtype: str, rank: int, owners: int) -> tuple[str, ...]:
    """Return which a and b make kernels of their own. Those of owners, each with its rank, are always masked."""
    if rank > configs.UNPACKED_RANK or owners:
        return ("f32",)
    return ("f32", "masked") if _DTYPES[dtype] == torch.float32 else tuple(_OPERANDS)


def _is_quick(variant: Variant) -> bool:
    if variant.dtype != "bf16" or variant.row == configs.DEFAULT or variant.operands != "f32":
        return False
    if variant.owners and (variant.arch in AMD or variant.dropout):
        return False
    ranks = (16, 64) if variant.arch == "sm_90" else (16,)
    return variant.rank in ranks and (variant.dropout == 0 or variant.rows > 512)


def faults(variant: Variant, launch: Launch, code: MachineCode) -> list[str]:
    """Return what is wrong with a kernel; an empty list if nothing is."""
    found = []
    use = (variant.row, _DTYPES[variant.dtype].itemsize, variant.rank, launch.name)
    if code.spills > _TOLERATED_SPILLS.get(use, 0):
        found.append(f"{code.spills} spills")
    limit = _DEFAULT_SHARED if variant.row == configs.DEFAULT else CARDS[variant.arch].shared_per_block
    if code.shared > limit:
        found.append(f"{code.shared} bytes of shared memory, {limit} available")
    has_product = launch.name.startswith(_PRODUCTS)
    if launch.name.startswith("phi_hb"):  # which may store z alone
        has_product = launch.arguments["y_ptr"] is not None
    if variant.dtype in ("bf16", "fp16") and has_product and not code.tensor_core:
        found.append("no tensor-core instruction")
    return found


def report(archs: Collection[str], dtypes: Collection[str], quick: bool) -> Iterator[Row]:
    """Compile the variants, each kernel once, and yield what their machine code holds."""
    seen = set()
    for variant in variants(archs, dtypes, quick):
        amd = variant.arch in AMD
        for launch in variant.record():
            given = tuple(name for name, value in launch.arguments.items() if value is None)
            key = (
                variant.arch,
                variant.dtype,
                launch.name,
                variant.operands,
                str(launch.constants),
                given,
                launch.warps,
                launch.stages,
            )
            if key in seen:
                continue
            seen.add(key)
            with compiling_for(variant.arch):
                compiled = compile_launch(launch)
            code = examine_amd(compiled) if amd else examine(compiled, variant.arch, launch.warps)
            yield Row(variant, launch, code, faults(variant, launch, code))


_HEADER = (
    f"{'arch':7}{'row':8}{'dtype':6}{'r':>4} {'A, B':8}{'drop':5}{'kernel':38}{'tile':>9}{'warps':>6}"
    f"{'stages':>7}{'regs':>5}{'spill':>6}{'smem KB':>8}{'CTA/SM':>7}{'occup.':>7}  "
    f"{'tensor core':22}{'async':>6}{'LDG':>5}{'SASS':>6}"
)


def _line(row: Row) -> str:
    variant, launch, code = row.variant, row.launch, row.code
    constants = launch.constants
    name = launch.name.removesuffix("_kernel") + (" +=" if constants.get("ADDS_DX") else "")
    name += " by owner" if variant.owners else ""
    tile = f"{constants.get('BLOCK_M', '-')}x{constants.get('BLOCK_L', constants.get('BLOCK_N', '-'))}"
    tensor_core = " ".join(f"{name} {count}" for name, count in sorted(code.tensor_core.items())) or "-"
    if variant.arch in AMD:
        resident, occupancy, tensor_core = "-", "-", f"v_mfma {sum(code.tensor_core.values())}"
    else:
        resident, occupancy = str(code.blocks_per_multiprocessor), f"{code.occupancy:.0%}"
    return (
        f"{variant.arch:7}{variant.row:8}{variant.dtype:6}{variant.rank:>4} {variant.operands:8}"
        f"{'yes' if variant.dropout else 'no':5}{name:38}{tile:>9}"
        f"{launch.warps:>6}{launch.stages:>7}{code.registers:>5}{code.spills:>6}"
        f"{code.shared / 1024:>8.1f}{resident:>7}{occupancy:>7}  {tensor_core:22}"
        f"{code.async_copies:>6}{code.plain_loads:>5}{code.instructions:>6}"
        + "".join(f"  FAULT: {fault}" for fault in row.faults)
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset that takes about a minute")
    parser.add_argument("--arch", action="append", choices=(*NVIDIA, *AMD), help="only this one (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=tuple(_DTYPES), help="only this one (may be repeated)")
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}, torch {torch.__version__}; compiled without a GPU, nothing was run")
    print(_HEADER)
    kernels = faulty = 0
    parts = list(itertools.product(options.arch or (*NVIDIA, *AMD), options.dtype or tuple(_DTYPES), [options.quick]))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as processes:
        for rows in processes.map(_part, *zip(*parts, strict=True)):
            for line, is_faulty in rows:
                print(line, flush=True)
                kernels += 1
                faulty += is_faulty
    print(f"{kernels} kernels, {faulty} with faults")
    return 1 if faulty else 0


def _part(arch: str, dtype: str, quick: bool) -> list[tuple[str, bool]]:
    """Return the lines of one part of the report, and whether each has a fault."""
    return [(_line(row), bool(row.faults)) for row in report((arch,), (dtype,), quick)]


if __name__ == "__main__":
    sys.exit(main())
