"""Random problems on the PTX machine, compared with float64.

``python python_tests/ptx_machine/tests/problems.py nvcc-sm_80 --count 300``: kernels of one compiler for one
architecture. A problem whose results are not as accurate as they have to be, or at which the machine reports something,
is printed with its number, and the exit status is 1. The last line holds the figures as JSON.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: it compiles
TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "ptx_machine"))

import ptx_cuda  # noqa: E402
import torch  # noqa: E402
from conformance.properties import PROPERTIES, check  # noqa: E402
from conformance.targets import ON_PTX, on_ptx  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[f"{compiler}-{arch}" for compiler in ON_PTX for arch in ptx_cuda.DEVICES])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the number of the first problem")
    parser.add_argument(
        "--kind",
        default="lone",
        help="owners: rows by owner; experts: those and their frozen weights; shared: layers that share x",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # several of these processes run side by side
    ptx_cuda.register()
    where = on_ptx(arguments.target)
    kernels, schedules, known, wrong = set(), 0, 0, 0
    with where.running():
        for number in range(arguments.first, arguments.first + arguments.count):
            try:
                known += check(where, arguments.kind, PROPERTIES[0], number)
            except (AssertionError, RuntimeError) as error:
                wrong += 1
                print(f"WRONG  {arguments.kind} problem {number}\n    {error}", flush=True)
            launched = where.take_kernels()
            kernels |= set(launched)
            schedules += len(launched)
    figures = {"problems": arguments.count, "wrong": wrong, "schedules": schedules, "known": known}
    print(json.dumps(figures | {"kernels": sorted(f"{arguments.target} {name}" for name in kernels)}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
