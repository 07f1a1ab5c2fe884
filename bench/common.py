"""What the benchmarks share: interleaved timing, the environment of a run, and JSON lines."""

import gc
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    steps: dict[str, Callable[[], object]], rounds: int, clock: str = "wall", min_seconds: float = 0.0
) -> dict[str, float]:
    """Return the median milliseconds of each step; every round runs each step once, so drift hits all alike.
    The order is drawn anew for each round: what a step leaves in caches and allocators helps or hinders its successor,
    which must not always be the same one.

    A step faster than ``min_seconds`` is repeated within its round. ``clock="cpu"`` counts the time of this process
    alone, for machines that are not idle; compare on one thread then.
    """
    now = CLOCKS[clock]
    repeats = {}
    for name, step in steps.items():
        step()
        start = now()
        step()
        repeats[name] = max(1, round(min_seconds / max(now() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        shuffle = random.Random(0).sample
        for _ in range(rounds):
            for name in shuffle(list(steps), len(steps)):
                start = now()
                for _ in range(repeats[name]):
                    steps[name]()
                times[name].append((now() - start) / repeats[name])
    finally:
        gc.enable()
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def environment() -> dict[str, object]:
    """Return what a reader needs to judge a number: machine, versions, threads and commit."""
    import afa_kernels

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=RESULTS.parent, capture_output=True, text=True)
        return done.stdout.strip()

    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "afa_kernels": afa_kernels.__version__,
        "cpu_backend": afa_kernels.backends()["cpu"].details,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def write_results(name: str, rows: list[dict[str, object]], measured_in: dict[str, object]) -> Path:
    """Write the rows behind the environment that they were measured in, taken before the first of them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"environment": measured_in}, *rows]))
    return path
