"""What a call of the CPU kernels takes beside its operands, result and gradients, seen from outside: the kernels' own
scratch is not in torch's counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import skip_unless_available

ROOT = Path(__file__).resolve().parent.parent
# Linux counts pages in batches for each thread.
SLACK_BYTES = 1 << 19


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of the resident set to reset")
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_branch_takes_little_more_than_z(dtype):
    skip_unless_available("cpu")
    threads = 1  # the kernels may take more with more of them
    flags = ["--shape", "32768,256,256,64", "--dtype", dtype, "--threads", str(threads), "--providers", "eager,afa.cpu"]
    command = [sys.executable, "-m", "bench.resident", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    got = json.loads(done.stdout.splitlines()[-1])
    z = 4 * 32768 * 64
    assert got["bound"] == z * 5 // 4 + threads * 4 * 64 * 512
    ours, eager = got["extra"]["afa.cpu"], got["extra"]["eager"]
    assert ours <= got["bound"] + SLACK_BYTES
    assert z * (1 if dtype == "f32" else 0.5) - SLACK_BYTES <= ours  # z is in there: the measurement sees it
    assert eager > 1.5 * ours
