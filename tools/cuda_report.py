"""Static proof about the CUDA kernels, from the compiler alone: no GPU is needed.

    python -m tools.cuda_report [--quick] [--arch 80,90,100,120] [--json FILE]

Compiles every kernel for every architecture and checks: no spills, registers and shared memory within the budget below,
tensor-core instructions (HMMA), asynchronous copies (LDGSTS) and ldmatrix (LDSM) in the SASS, and from sm_90 on a wait
for the kernel before it (ACQBULK) ahead of every access of global memory. Prints one table with the occupancy, and for
each main loop the instructions of a warp in one turn, on the shortest path that makes all products and moves the whole
tile: without dropout, and with the cheapest activation. "TB/s" is the rate of x, dy, y and dx that these allow where
each scheduler of the card issues one instruction in two cycles. Exit status 1 if a check fails. cuobjdump and
nvdisasm come from PATH, from the CUDA toolkit or from the triton package.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.model.cuda_launches import planner
from bench.model.gpus import CARDS, SCHEDULERS
from tools.sass import main_loops

CSRC = Path(__file__).resolve().parents[1] / "csrc"
RANKS = (16, 32, 64)
SOURCES = (*(f"rank{rank}" for rank in RANKS), "small")
ARCHITECTURES, QUICK_ARCHITECTURES = ("80", "90", "100", "120"), ("80", "90")


SMALL_THREADS = 128
ISSUED = 0.5  # instructions of a scheduler per cycle
# How often the bytes of a tile pass in a turn of a main loop: y is read and written, and of the x kernel x and dx are
# one tile each. The forward kernel has a loop of each kind.
PASSES = {"forward": (1, 2), "project": (1,), "expand": (2,), "dy": (1,), "project_dy": (1,), "db": (1,), "x": (2,)}

# From here on a kernel may start before the one before it has ended, so that it has to wait first.
FIRST_OVERLAPPED = 90

# Registers per thread that a kernel may take: launch_plan says it for those that use tensor cores.
SMALL_KERNELS = {"reduce": 80, "pack": 80}
# sinf and cosf reduce large arguments through a small array in local memory: a stack, and no spill.
STACK_BUDGET = 48
SHOWN_OPCODES = ("HMMA", "LDGSTS", "LDSM")  # tensor cores, asynchronous copies, ldmatrix
WAIT = "ACQBULK"  # griddepcontrol.wait
OPCODES = (*SHOWN_OPCODES, "LDL", "STL", WAIT)
GLOBAL_OPCODES = ("LD", "ST", "LDG", "STG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG")
EARLY = "global memory before the wait"

_ENTRY = re.compile(r"afa\d+(\w+?)_kernelINS_4(Bf16|Fp16)E(?:Li(\d+)E)?")


@dataclass
class Row:
    """One kernel on one architecture."""

    arch: str
    kernel: str
    rank: int
    dtype: str
    registers: int = 0
    register_budget: int = 0
    stack: int = 0
    spill_bytes: int = 0
    threads: int = 0
    stages: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    opcodes: dict[str, int] = field(default_factory=dict)
    instructions: list[int] = field(default_factory=list)  # of a warp in a turn of each main loop
    rate: float = 0.0  # bytes per second that they allow, in the slowest of them
    faults: list[str] = field(default_factory=list)


def find_tool(name: str) -> str:
    """Return the path of a CUDA binary tool, or end with what to install."""
    places = [shutil.which(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        places.append(str(Path(nvcc).resolve().parent / name))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    for place in places:
        if place and os.access(place, os.X_OK):
            return place
    raise SystemExit(f"cuda-report: {name} was not found on PATH, beside nvcc, or in the triton package")


def identify(mangled: str) -> tuple[str, int, str] | None:
    """Return kernel, rank class and dtype of a mangled entry name."""
    match = _ENTRY.search(mangled)
    if match is None:
        return None
    kernel, dtype, rank = match.groups()
    return kernel, int(rank or 0), dtype.lower()


def parse_ptxas(text: str, arch: str) -> dict[str, Row]:
    """Return what ``ptxas -v`` says, by mangled name."""
    rows: dict[str, Row] = {}
    current = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            identity = identify(match[1])
            current = None if identity is None else rows.setdefault(match[1], Row(arch, *identity))
        elif current is None:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack, current.spill_bytes = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
    return rows


def count_opcodes(sass: str) -> dict[str, dict[str, int]]:
    """Return how often each opcode of interest occurs, by mangled name."""
    counts: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = counts.setdefault(match[1], dict.fromkeys((*OPCODES, EARLY), 0))
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line):
            if match[1] in OPCODES:
                current[match[1]] += 1
            if match[1] in GLOBAL_OPCODES and not current[WAIT]:
                current[EARLY] += 1
    return counts


def compile_one(source: str, arch: str, folder: Path, tool: str) -> list[Row]:
    cubin = folder / f"{source}.{arch}.cubin"
    command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", f"-I{CSRC}"]
    done = subprocess.run(
        [*command, str(CSRC / "cuda" / "kernels" / f"{source}.cu"), "-o", str(cubin)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"cuda-report: nvcc failed for {source}.cu, sm_{arch}\n{done.stderr}")
    rows = parse_ptxas(done.stderr, arch)
    sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for name, counts in count_opcodes(sass).items():
        if name in rows:
            rows[name].opcodes = counts
    flow = subprocess.run([find_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True)
    for part in re.split(r"\.section\s+\.text\.", flow.stdout)[1:]:
        name = part.partition(",")[0]
        if name in rows and rows[name].kernel not in SMALL_KERNELS:
            rows[name].instructions = main_loops(part)
    return list(rows.values())


def add_launch(row: Row, plans: dict[tuple[str, str, int], dict]) -> None:
    """Add threads, shared memory and occupancy."""
    card = CARDS[f"sm_{row.arch}"]
    if row.kernel in SMALL_KERNELS:
        row.threads, row.register_budget = SMALL_THREADS, SMALL_KERNELS[row.kernel]
    else:
        plan = plans[row.arch, row.kernel, row.rank]
        row.threads, row.stages, row.shared_bytes = (plan["threads"], plan["stages"], plan["shared_bytes"])
        row.register_budget = plan["registers"]
        issued = card.multiprocessors * SCHEDULERS * ISSUED * card.clock / (row.threads // 32)
        rates = [
            passes * plan["tile_bytes"] * issued / count
            for passes, count in zip(PASSES[row.kernel], row.instructions, strict=False)
        ]
        row.rate = min(rates, default=0.0)
    row.blocks_per_sm = card.blocks_per_multiprocessor(row.threads, row.registers, row.shared_bytes)
    row.occupancy = row.blocks_per_sm * row.threads / card.resident_threads


def check(row: Row) -> None:
    card = CARDS[f"sm_{row.arch}"]
    if row.spill_bytes:
        row.faults.append(f"{row.spill_bytes} bytes of spills")
    if row.registers > row.register_budget:
        row.faults.append(f"{row.registers} registers, budget {row.register_budget}")
    if row.stack > STACK_BUDGET:
        row.faults.append(f"{row.stack} bytes of stack, budget {STACK_BUDGET}")
    if row.shared_bytes > card.shared_per_block:
        row.faults.append(f"{row.shared_bytes} bytes of shared memory, the block gets {card.shared_per_block}")
    if row.blocks_per_sm < 1:
        row.faults.append("no block fits an SM")
    if int(row.arch) >= FIRST_OVERLAPPED and (not row.opcodes.get(WAIT) or row.opcodes.get(EARLY)):
        row.faults.append("does not wait for the kernel before it, or touches memory first")
    if row.kernel not in SMALL_KERNELS and len(row.instructions) != len(PASSES[row.kernel]):
        row.faults.append(f"{len(row.instructions)} main loops, expected {len(PASSES[row.kernel])}")
    for opcode in SHOWN_OPCODES:
        if row.kernel not in SMALL_KERNELS and not row.opcodes.get(opcode):
            row.faults.append(f"no {opcode} in the SASS")


def launch_plans(architectures: list[str]) -> dict[tuple[str, str, int], dict]:
    """Return the launch of every kernel by architecture, kernel and rank: many rows, and few for the split
    forward."""
    native = planner()
    plans = {}
    for arch in architectures:
        limits = CARDS[f"sm_{arch}"].planned_for
        for rank in RANKS:
            for m in (8192, 256):
                for plan in native.launch_plan((m, 4096, 4096, rank), *limits):
                    plans.setdefault((arch, plan["kernel"], rank), plan)
    return plans


def print_table(rows: list[Row]) -> None:
    columns = {
        "arch": lambda row: f"sm_{row.arch}",
        "kernel": lambda row: row.kernel,
        "r": lambda row: row.rank or "-",
        "dtype": lambda row: row.dtype,
        "registers": lambda row: f"{row.registers}/{row.register_budget}",
        "stack": lambda row: row.stack,
        "spilled": lambda row: row.spill_bytes,
        "threads": lambda row: row.threads,
        "stages": lambda row: row.stages or "-",
        "shared KB": lambda row: f"{row.shared_bytes / 1024:.1f}",
        "blocks/SM": lambda row: row.blocks_per_sm,
        "occupancy": lambda row: f"{row.occupancy:.0%}",
        **{name: lambda row, name=name: row.opcodes.get(name, 0) for name in SHOWN_OPCODES},
        "instructions": lambda row: " + ".join(map(str, row.instructions)) or "-",
        "TB/s": lambda row: f"{row.rate / 1e12:.1f}" if row.rate else "-",
        "verdict": lambda row: "; ".join(row.faults) or "ok",
    }
    cells = [list(columns), *([str(value(row)) for value in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"architectures {', '.join(QUICK_ARCHITECTURES)} only")
    parser.add_argument("--arch", help="comma-separated architectures")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("cuda-report: nvcc is not on PATH; nothing was checked", file=sys.stderr)
        return 2
    by_default = QUICK_ARCHITECTURES if options.quick else ARCHITECTURES
    architectures = options.arch.split(",") if options.arch else by_default
    if unknown := [arch for arch in architectures if arch not in ARCHITECTURES]:
        parser.error(f"--arch: expected some of {', '.join(ARCHITECTURES)}, got {', '.join(unknown)}")
    tool, plans = find_tool("cuobjdump"), launch_plans(architectures)
    os.environ["PATH"] += os.pathsep + str(Path(tool).parent)  # cuobjdump calls nvdisasm
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compile_one, source, arch, Path(folder), tool) for arch in architectures for source in SOURCES
        ]
        rows = [row for job in jobs for row in job.result()]
    for row in rows:
        add_launch(row, plans)
        check(row)
    rows.sort(key=lambda row: (int(row.arch), row.kernel, row.rank, row.dtype))
    print_table(rows)
    faulty = [row for row in rows if row.faults]
    on = ", ".join(f"sm_{arch} ({CARDS[f'sm_{arch}'].name})" for arch in architectures)
    print(f"{len(rows) // len(architectures)} kernels on each of {on}: {len(faulty)} faulty")
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return int(bool(faulty) or not rows)


if __name__ == "__main__":
    raise SystemExit(main())
