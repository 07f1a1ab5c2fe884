"""csrc/cuda/device.cpp, which launches kernels and asks for devices, on a runtime that plays faults."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = ("device.cpp", "plan.cpp", "tests/fake_runtime.cpp", "tests/device_test.cpp")


def test_launches_and_devices_on_a_runtime_that_fails(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: CUDA's headers are not here")
    program = tmp_path / "device_test"
    # nvcc only knows where the headers are: these files are the host compiler's.
    command = ["nvcc", "--cudart=none", "-std=c++17", f"-I{CSRC}", *(CSRC / "cuda" / s for s in SOURCES), "-o", program]
    built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "device: 13 cases passed\n"
