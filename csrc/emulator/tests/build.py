"""Builds the emulator's C++ programs with the compiler alone: plain, under ASan + UBSan, or under
ThreadSanitizer.

The emulator's core is compiled without a sanitizer and announces fibers and accesses by hand
(fiber.h says why).
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2]
CORE = ("fiber", "simt", "memory", "collectives")
KERNELS = "emulator/kernels.cpp"
HOST = (
    "emulator/device.cpp",
    "cuda/host/ops.cpp",
    "cuda/host/plan.cpp",
    "emulator/tests/problem.cpp",
    "emulator/tests/driver.cpp",
)
HAZARDS = "emulator/tests/hazards.cpp"

_COMMON = ("-std=c++17", "-Wall", "-Wextra")
# Uninitialised variables become a pattern that is wrong everywhere, so that a forgotten
# initialisation is seen (gcc 12 and clang 8 have it).
_PATTERN = "-ftrivial-auto-var-init=pattern"
FLAGS = {
    "plain": ("-O1",),
    "asan": (
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-DSIMT_ASAN",
    ),
    "tsan": ("-O1", "-g", "-fsanitize=thread", "-DSIMT_TSAN"),
}
ENVIRONMENT = {
    "plain": {},
    "asan": {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1"},
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@lru_cache(maxsize=1)
def common_flags() -> tuple[str, ...]:
    probe = [compiler(), _PATTERN, "-fsyntax-only", "-x", "c++", os.devnull]
    known = subprocess.run(probe, capture_output=True).returncode == 0
    return (*_COMMON, _PATTERN) if known else _COMMON


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def compile_source(kind: str, source: str, target: Path, csrc: Path = CSRC) -> Path:
    """Compile ``csrc / source`` into the object file ``target``."""
    if Path(source).stem in CORE:
        flags = ["-O2", *(flag for flag in FLAGS[kind] if flag.startswith("-D"))]
    else:
        flags = list(FLAGS[kind])
    _run(
        [
            compiler(),
            *common_flags(),
            *flags,
            f"-I{csrc}",
            "-c",
            str(csrc / source),
            "-o",
            str(target),
        ]
    )
    return target


def compile_all(kind: str, sources: list[str], folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(lambda s: compile_source(kind, s, folder / f"{Path(s).stem}.o"), sources)
        return dict(zip(sources, objects, strict=True))


def link(kind: str, objects: list[Path], program: Path) -> Path:
    _run([compiler(), *FLAGS[kind], *map(str, objects), "-o", str(program)])
    return program


def core_sources() -> list[str]:
    return [f"emulator/{name}.cpp" for name in CORE]


def run(kind: str, program: Path, *arguments: str, timeout: float = 600) -> tuple[bool, str]:
    """Run a program; return whether it was content, and the line that says why not."""
    try:
        done = subprocess.run(
            [str(program), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=os.environ | ENVIRONMENT[kind],
        )
    except subprocess.TimeoutExpired:
        return False, f"no end within {timeout:.0f} s"
    lines = (done.stdout + done.stderr).splitlines()
    telling = [line for line in lines if line.startswith(("FAILED", "SUMMARY")) or "runtime error" in line]
    if done.returncode == 0:
        return True, lines[-1] if lines else ""
    return False, telling[0] if telling else f"ended with status {done.returncode}"
