"""``python -m bench.resident``: memory of a branch's forward and backward beyond operands, result and gradients.

torch's own counters (memory.py) do not see what the CPU kernels allocate for themselves, so this watches the process:
Linux keeps the peak of the resident set and lets the process reset it. Every allocation above a few pages gets a
mapping of its own and returns it when freed, so that the peak is what was held at once. Huge pages are off: one touched
byte would count as 2 MB. Linux counts pages in batches for each CPU, so the process stays on as many CPUs as it has
threads, and prints how far the count may be off. Needs Linux and glibc; run in a process that does nothing else.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.problem import Problem
from bench.providers import providers
from bench.runner import Runner, build
from bench.shapes import DTYPES, Case

_M_MMAP_THRESHOLD = -3  # of mallopt(3), in glibc's malloc.h
_OWN_MAPPING_BYTES = 1 << 14
_REPEATS = 2
_PR_SET_THP_DISABLE = 41  # of prctl(2)


# Of each thread, at ranks up to 64: 51 KiB of staged rows, 24 of packed tiles, 16 for a tile of dB, and its share of
# the rows of h, act' and dz (72) and of the partial sums of dz, super_rows * r floats (24 KiB) for the first thread's
# columns of N and each slab of 256 behind them: 9 of them with two threads at N = 4096 (csrc/cpu/isa/plan.h).
_THREAD_BYTES = 256 << 10


def bound(case: Case, threads: int) -> int:
    """Return the most bytes that the CPU kernels may take for a forward and backward at ranks up to 64.

    z; the packed factors, r (K + N) floats, or half of that where the CPU multiplies bfloat16; the sums of dA and dB,
    as many floats, unless the gradients are float32 and hold them; and what each thread works on.
    """
    factors = 4 * case.r * (case.k + case.n)
    sums = 0 if case.dtype == "f32" else factors
    return DTYPES[case.dtype].itemsize * case.m * case.r + factors + sums + threads * _THREAD_BYTES


def resolution(cpus: int) -> int:
    """Return the bytes that the difference of two counts may be off on ``cpus`` CPUs.

    Each CPU keeps back less than a batch of pages: 64 before Linux 6.2, since then 32 or two per CPU of the machine
    (``percpu_counter_batch``).
    """
    return 2 * cpus * max(64, 2 * (os.cpu_count() or 1)) * os.sysconf("SC_PAGE_SIZE")


def extra_bytes(runner: Runner) -> int:
    """Return the peak of the resident set in a forward and backward, over its start, without result and gradients.

    Raises:
        OSError: the system does not keep or reset the peak.
    """
    results = sum(t.nbytes for t in (runner.problem.dy, *runner.inputs))
    return min(_peak(runner) for _ in range(_REPEATS)) - results


def _peak(runner: Runner) -> int:
    base = runner.prepare()
    gc.collect()
    before = present_bytes()
    return peak_bytes(lambda: runner.backward(runner.forward(base))) - before


def present_bytes() -> int:
    """Return the size of the resident set."""
    return _status("VmRSS")


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the largest size of the resident set during a call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    call()
    return _status("VmHWM")


def count_exactly() -> None:
    """Give every allocation above a few pages a mapping of its own, without huge pages.

    Raises:
        OSError: the C library does not do that.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES):
        raise OSError("the C library does not map large allocations apart: this needs glibc")
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resident", description=__doc__)
    add = parser.add_argument
    add("--shape", default="16384,1024,1024,32", help="M,K,N,r")
    add("--dtype", choices=[*DTYPES], default="f32")
    add("--providers", default="eager,afa.torch,afa.cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    try:
        count_exactly()
    except OSError as error:
        parser.error(str(error))
    cpus = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(arguments.threads)
    m, k, n, r = map(int, arguments.shape.split(","))
    dtype = arguments.dtype
    case = Case("branch", "resident", m, k, n, r, False, dtype, dtype, 0.5, "silu", 0.0, "cpu")
    problem = Problem.of(case)
    extra = {}
    for name in arguments.providers.split(","):
        runner = build(providers()[name], problem)
        _peak(runner)  # what happens once, such as starting threads, is not counted
        extra[name] = extra_bytes(runner)
    print(json.dumps({"bound": bound(case, arguments.threads), "resolution": resolution(len(cpus)), "extra": extra}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
