"""Clocks, samples and quantiles.

Providers are interleaved in one process: a round takes one sample of each, so that a slow minute of
the machine hits all of them. Ratios are ratios of medians.
"""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

_SHORTEST_SAMPLE_MS = 1.0  # shorter calls are repeated within a sample
_MOST_CALLS = 200


class Clock(Protocol):
    def mark(self) -> object: ...
    def milliseconds(self, start: object, end: object) -> float: ...
    def wait(self) -> None: ...


class CpuClock:
    def mark(self) -> int:
        return time.perf_counter_ns()

    def milliseconds(self, start: int, end: int) -> float:
        return (end - start) * 1e-6

    def wait(self) -> None:
        pass


class CudaClock:
    """Events on the current stream: times of the device, not of the launches."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()


def clock_of(device: str) -> Clock:
    return CudaClock() if torch.device(device).type == "cuda" else CpuClock()


@dataclass
class Work:
    """What one provider does in one sample: ``prepare()`` untimed, then ``steps`` one after the
    other, each timed under its name, each taking what the one before returned."""

    prepare: Callable[[], object]
    steps: dict[str, Callable[[object], object]]
    total: str | None = None  # the name for the sum of the steps
    samples: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 1


def sample(work: Work, clock: Clock, calls: int) -> dict[str, float]:
    """Return the mean milliseconds of each step, and of their sum, over ``calls`` calls."""
    marks = []
    for _ in range(calls):
        state = work.prepare()
        row = [clock.mark()]
        for step in work.steps.values():
            state = step(state)
            row.append(clock.mark())
        marks.append(row)
        del state  # freed between calls, outside of the next call's time
    clock.wait()
    result = {
        name: statistics.fmean(clock.milliseconds(row[i], row[i + 1]) for row in marks)
        for i, name in enumerate(work.steps)
    }
    if work.total:
        result[work.total] = sum(result.values())
    return result


def measure(works: dict[str, Work], clock: Clock, seconds: float, least: int = 5, most: int = 60) -> int:
    """Fill ``samples`` of every work by interleaved rounds for about ``seconds``; return how many.

    At least ``least`` rounds are made unless they would take three times as long, and at least one.
    The first call of each work is a warm-up; the second sets how many calls make a sample.
    """
    start = time.monotonic()
    for work in works.values():
        sample(work, clock, 1)
        once = sum(sample(work, clock, 1).get(name, 0.0) for name in work.steps)
        work.calls = min(_MOST_CALLS, max(1, math.ceil(_SHORTEST_SAMPLE_MS / max(once, 1e-4))))
        work.samples = {}
    names = list(works)
    draw = random.Random(0)
    rounds = 0
    while rounds < most:
        spent = time.monotonic() - start
        if rounds and spent > (seconds if rounds >= least else 3 * seconds):
            break
        # In a new order each round: what a provider leaves in caches and allocators helps or hinders its successor,
        # which must not always be the same one.
        for name in draw.sample(names, len(names)):
            for step, value in sample(works[name], clock, works[name].calls).items():
                works[name].samples.setdefault(step, []).append(value)
        rounds += 1
    return rounds


def quantile(values: list[float], q: float) -> float:
    """Return the ``q`` quantile, interpolated between the nearest two."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(values: list[float], others: list[float]) -> float:
    """Return how the median of ``values`` compares with that of ``others``."""
    return statistics.median(values) / statistics.median(others)
