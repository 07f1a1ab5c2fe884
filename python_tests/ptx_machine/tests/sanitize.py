"""The PTX machine under ASan and UBSan: its own tests, and a few of Triton's kernels on it.

``python python_tests/ptx_machine/tests/sanitize.py`` builds the module in build/sanitize-ptx and runs the tests with
it.
"""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "sanitize-ptx"
HERE = "python_tests/ptx_machine/tests"
MACHINE = ("atomics", "floats", "hazards", "instructions", "memory", "overlap", "wgmma")  # no instruction is untested
TESTS = [f"{HERE}/test_ptx_{name}.py" for name in MACHINE]
ON_A_GPU = ["python_tests/conformance", f"{HERE}/test_ptx_triton.py", "-k", "is_accurate or removed"]


def build() -> None:
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    options = ["-DAFA_BUILD_PTX_MACHINE=ON", "-DAFA_BUILD_CUDA=0", "-DAFA_PTX_SANITIZE=ON"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([*configure, *options], check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(BUILD), "--target", "_ptx"], check=True, env=environment)


def run(*arguments: str, **environment: str) -> None:
    """Run tests in a process that starts with the sanitizer's library."""
    # The C++ library too: the sanitizer wants to see exceptions being thrown.
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment |= {
        "LD_PRELOAD": " ".join(map(str.strip, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "AFA_KERNELS_REQUIRE": "",
    }
    subprocess.run([sys.executable, __file__, *arguments], check=True, cwd=ROOT, env=os.environ | environment)


def inside(arguments: list[str]) -> int:
    """Put the module of this build in the place of the package's, and run the tests."""
    sys.path.insert(0, str(ROOT))
    import pytest

    import afa_kernels

    (path,) = BUILD.glob(f"**/_ptx{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    spec = importlib.util.spec_from_file_location("afa_kernels._ptx", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["afa_kernels._ptx"] = afa_kernels._ptx = module
    return pytest.main(["-q", "-p", "no:cacheprovider", "--capture=sys", *arguments])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(inside(sys.argv[1:]))
    build()
    with ThreadPoolExecutor(2) as pool:
        each = [pool.submit(run, *ON_A_GPU, AFA_TEST_SIMULATED_GPU=arch) for arch in ("sm_80", "sm_90")]
        each.append(pool.submit(run, *TESTS))
        for done in each:
            done.result()
