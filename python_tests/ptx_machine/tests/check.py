"""All that the PTX machine proves of the compiled kernels: random problems, and faults planted in PTX and in source.

``python python_tests/ptx_machine/tests/check.py --problems 300 --others 100 --planted 144``, for each compiler and
architecture (or for those that are named). ``--only`` runs one of the two. Ends with
figures; exit status 1 if anything was wrong.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS

HERE = Path(__file__).resolve().parent
TARGETS = ("triton-sm_90", "triton-sm_80", "nvcc-sm_90", "nvcc-sm_80")  # the slow ones first
PART = 100  # problems of one process
KINDS = {"nvcc": ("shared",), "triton": ("owners", "experts")}  # beside lone calls
SOURCE_FAULTS, SOURCE_PART = len(MUTANTS), 14  # of one process


def present() -> list[str]:
    """Return the targets of this build: without nvcc there are none of its."""
    sys.path.insert(0, str(HERE.parents[2]))
    has_nvcc = importlib.util.find_spec("afa_kernels._cuda_on_ptx") is not None
    return [target for target in TARGETS if has_nvcc or not target.startswith("nvcc")]


def run(script: str, *arguments: str) -> tuple[bool, dict]:
    """Run a script, print what it found, and return whether it was content and its figures."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    *found, last = done.stdout.splitlines() or [""]
    try:
        figures = json.loads(last)
    except ValueError:
        found, figures = [*found, last, done.stderr], {}
    found.append(f"{'wrong' if done.returncode else 'ok':6} {script} {' '.join(arguments)}")
    print("\n".join(found), flush=True)
    return done.returncode == 0 and bool(figures), figures


def commands(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return the processes to run."""
    problems = [
        ("problems.py", target, "--first", str(first), "--count", str(min(PART, count - first)), "--kind", kind)
        for target in arguments.targets
        for kind in ("lone", *KINDS[target.partition("-")[0]])
        for count in [arguments.problems if kind == "lone" else arguments.others]
        for first in range(0, count, PART)
    ]
    faults = [
        ("mutation.py", target, "--count", str(arguments.planted), "--seed", str(arguments.seed))
        for target in arguments.targets
    ]
    if any(target.startswith("nvcc") for target in arguments.targets):
        step = ("--step", "7") if arguments.quick else ()
        faults += [
            ("source_mutation.py", "--first", str(first), "--count", str(SOURCE_PART), *step)
            for first in range(0, SOURCE_FAULTS, SOURCE_PART)
        ]
    return {"problems": problems, "mutation": faults, "": faults + problems}[arguments.only]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = present()
    parser.add_argument("targets", nargs="*", default=targets, help="of " + ", ".join(TARGETS))
    parser.add_argument("--problems", type=int, default=300, help="per target")
    parser.add_argument(
        "--others",
        type=int,
        default=100,
        help="problems of rows by owner, and of those with frozen weights (Triton); of layers that share x (nvcc)",
    )
    parser.add_argument("--planted", type=int, default=144, help="per target")
    parser.add_argument(
        "--quick", action="store_true", help="20 problems, 8 others and 12 faults per target, 8 in the source"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the places of faults")
    parser.add_argument("--only", choices=("", "problems", "mutation"), default="")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    arguments = parser.parse_args()
    for target in TARGETS:
        if target not in targets:
            print(f"{target}: not part of this build, which found no nvcc")
    if arguments.quick:
        arguments.problems, arguments.others, arguments.planted = 20, 8, 12
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda command: run(*command), commands(arguments)))
    every = [figures for _, figures in done]

    def total(name: str) -> int:
        return sum(figures.get(name, 0) for figures in every)

    kernels = len({kernel for figures in every for kernel in figures.get("kernels", ())})
    print(
        f"PTX: {kernels} kernels, {total('schedules')} schedules, {total('problems')} problems of which "
        f"{total('wrong')} wrong and {total('known')} with the known report, {total('planted')} planted, "
        f"{total('caught')} caught"
    )
    print(f"source of the CUDA kernels: {total('planted in the source')} planted, {total('told')} caught")
    return not all(content for content, _ in done)


if __name__ == "__main__":
    sys.exit(main())
