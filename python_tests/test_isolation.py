"""What a caller's environment holds reaches no test, and what a run chooses does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEFT_BY_OTHERS = {
    "AFA_KERNELS_BACKEND": "reference",
    "AFA_KERNELS_AUTOTUNE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "WORLD_SIZE": "8",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "HF_HUB_OFFLINE": "0",
    "HF_HOME": "/nowhere",
}
CHOSEN = {"AFA_CPU_ISA": "avx2", "OMP_NUM_THREADS": "3", "TRITON_INTERPRET": "0", "AFA_KERNELS_REQUIRE": "cpu"}


def test_the_environment_of_the_caller_stays_outside():
    code = "import os, isolation; print({name: os.environ.get(name) for name in %r})" % [*LEFT_BY_OTHERS, *CHOSEN]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | LEFT_BY_OTHERS | CHOSEN,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = eval(done.stdout)
    assert {name: seen[name] for name in CHOSEN} == CHOSEN
    assert seen.pop("HF_HUB_OFFLINE") == "1"
    home = seen.pop("HF_HOME")
    assert home != "/nowhere" and not os.path.exists(os.path.dirname(home)), "left behind"
    assert not any(seen[name] for name in LEFT_BY_OTHERS if name in seen)


@pytest.mark.fast
def test_a_fast_test_cannot_start_a_process():
    with pytest.raises(AssertionError, match="mark it with pytest.mark.long"):
        subprocess.run([sys.executable, "-c", ""])
