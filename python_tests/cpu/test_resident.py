"""What a call of the CPU kernels takes beside its operands, result and gradients, seen from outside: the kernels' own
scratch is not in torch's counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import skip_unless_available

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of the resident set to reset"
)


def measured(shape: str, dtype: str, threads: int, providers: str) -> tuple[int, int, dict[str, int]]:
    """Return the bound of the CPU kernels, how far Linux's counts may be off, and what each provider took, in bytes."""
    skip_unless_available("cpu")
    flags = ["--shape", shape, "--dtype", dtype, "--threads", str(threads), "--providers", providers]
    command = [sys.executable, "-m", "bench.resident", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    got = json.loads(done.stdout.splitlines()[-1])
    return got["bound"], got["resolution"], got["extra"]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_branch_takes_little_more_than_z(dtype):
    # One thread: each further one takes 256 KiB more.
    bound, resolution, extra = measured("32768,256,256,64", dtype, 1, "eager,afa.cpu")
    z = 32768 * 64 * (4 if dtype == "f32" else 2)
    assert bound <= 1.07 * z + (1 << 18)
    ours, eager = extra["afa.cpu"], extra["eager"]
    assert ours <= bound + resolution
    assert z - resolution <= ours  # z is in there: the measurement sees it
    assert eager > 1.5 * ours


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_few_rows_of_a_high_rank_stay_in_the_bound_too(dtype, threads):
    """Here the packed factors and the sums of their gradients are more than z is.

    They are 5 MiB each. A second copy of the panels of A is 2 MiB at the least, sums of dA beside a dA of float32 are
    4 MiB: more than the count may be off and what the kernels leave of the bound together.
    """
    bound, resolution, extra = measured("512,16384,4096,64", dtype, threads, "afa.cpu")
    z = 512 * 64 * (4 if dtype == "f32" else 2)
    assert bound == z + (5 << 20) * (1 if dtype == "f32" else 2) + threads * (1 << 18)
    assert extra["afa.cpu"] <= bound + resolution
