"""What a call does, counted rather than timed, beside what counts.json records.

Counts do not depend on the machine's speed or load, so a test holds them: calls of torch's GEMMs and of our operators,
bytes allocated, the peak and the bytes saved for the backward. ``python -m bench.model --write-counts`` records them.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.memory import allocations, saved_bytes
from bench.problem import Problem
from bench.providers import Provider, one_backend, providers
from bench.runner import build
from bench.shapes import Case

RECORDED = Path(__file__).parent / "counts.json"
# Bytes vary a little between versions of torch (0-dim temporaries), never by a tensor of the call.
_SLACK_BYTES = 512
_GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
_OURS = "afa_kernels::"
_SHAPE = {"m": 96, "k": 160, "n": 224, "r": 8}


def _case(scope: str, dtype: str, adapter_dtype: str, alpha_t: float) -> Case:
    return Case(
        scope,
        "counted",
        bias=True,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        alpha_t=alpha_t,
        activation="silu",
        dropout=0.0,
        device="cpu",
        **_SHAPE,
    )


CASES = {
    "layer": _case("layer", "f32", "f32", 0.5),
    "layer, bf16": _case("layer", "bf16", "bf16", 0.5),
    "layer, bf16 with float32 adapter": _case("layer", "bf16", "f32", 0.5),
    "layer at identity": _case("layer", "f32", "f32", 0.0),
    "branch": _case("branch", "f32", "f32", 0.5),
    "branch at identity": _case("branch", "f32", "f32", 0.0),
}


def count_calls(call: Callable[[], object]) -> Counter:
    """Return how often each operator runs in ``call``, those inside of ours included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return Counter(event.name() for event in profiler.profiler.kineto_results.events())


def counts(provider: Provider, case: Case) -> dict[str, int]:
    """Return what one forward and backward of ``provider`` on ``case`` does."""
    runner = build(provider, Problem.of(case), inplace=True)
    base = runner.prepare()

    def call() -> object:
        return runner.backward(runner.forward(base))

    call()  # what happens once is not counted
    base = runner.prepare()
    calls = count_calls(call)
    result = {
        "gemms": sum(calls[name] for name in _GEMMS),
        "operators": sum(n for name, n in calls.items() if name.startswith(_OURS)),
        "saved_bytes": saved_bytes(lambda: runner.forward(runner.prepare()), runner.operands),
    }
    if case.dtype == "f32":
        # A 16-bit GEMM of torch may reorder its operands into buffers that depend on the CPU.
        base = runner.prepare()
        result["peak_bytes"], result["allocated_bytes"] = allocations(call)
    return result


def measure() -> dict[str, dict[str, dict[str, int]]]:
    """Return the counts of every case and every backend of this machine that can take it, on one
    thread: a backend's scratch may grow with the threads."""
    known = providers()
    ours = {name: known[name] for name in (f"afa.{backend}" for backend in one_backend() if backend != "reference")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            title: {name: counts(provider, case) for name, provider in ours.items() if provider.absent(case) is None}
            for title, case in CASES.items()
        }
    finally:
        torch.set_num_threads(threads)


def compare(measured: dict, recorded: dict) -> tuple[list[str], list[str]]:
    """Return what is worse than recorded (or was never recorded), and what is better."""
    worse, better = [], []
    for title, backends in measured.items():
        for name, values in backends.items():
            known = recorded.get(title, {}).get(name)
            if known is None:
                worse.append(f"{title}, {name}: not recorded")
                continue
            for what, value in values.items():
                slack = _SLACK_BYTES if what.endswith("bytes") else 0
                text = f"{title}, {name}: {what} {known[what]} -> {value}"
                if value > known[what] + slack:
                    worse.append(text)
                elif value < known[what] - slack:
                    better.append(text)
    return worse, better


def write() -> list[str]:
    """Record what this machine counts; return what is more or less than was recorded before. Backends that this machine
    lacks keep what another one recorded."""
    measured = measure()
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    merged = {title: recorded.get(title, {}) | backends for title, backends in measured.items()}
    RECORDED.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")
    worse, better = compare(measured, recorded)
    return [*worse, *better, f"recorded in {RECORDED}"]
