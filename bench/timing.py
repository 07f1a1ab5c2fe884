"""Clocks, samples and quantiles.

Providers are interleaved in one process: a round takes one sample of each, so that a slow minute of
the machine hits all of them. A ratio is the median, over rounds, of the ratio within the round: where a neighbor
halves the machine's speed for some rounds, the two medians may lie at different speeds, the ratios do not.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

_SHORTEST_SAMPLE_MS = 1.0  # shorter calls are repeated within a sample
_MOST_CALLS = 200
_LEAST_ROUNDS, _MOST_ROUNDS = 7, 200
CONFIDENCE = 0.95


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


class ProcessClock(CpuClock):
    """The time of this process alone, summed over its threads: for one thread, on a machine that is not idle."""

    def mark(self) -> int:
        return time.process_time_ns()


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


def clock_of(device: str, name: str = "wall") -> Clock:
    """Return the clock ``name`` ("wall" or "process") of ``device``; a GPU has its events alone."""
    if torch.device(device).type == "cuda":
        return CudaClock()
    return ProcessClock() if name == "process" else CpuClock()


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


def measure(
    works: dict[Hashable, Work],
    clock: Clock,
    seconds: float,
    precision: float = 0.0,
    *,
    least: int = _LEAST_ROUNDS,
    most: int = _MOST_ROUNDS,
) -> int:
    """Fill ``samples`` of every work by interleaved rounds; return how many.

    Rounds are made until the ratio of every work to the first one is known to ``precision`` (half of its interval,
    relative; 0: never), but for at most about ``seconds``, and at most ``most``. At least ``least`` rounds are made
    unless they would take three times ``seconds``, and at least one. The first call of each work is a warm-up; the
    second sets how many calls make a sample.
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
    gc.collect()
    gc.disable()  # a collection would fall into one provider's time
    try:
        while rounds < most:
            spent = time.monotonic() - start
            if rounds and spent > (seconds if rounds >= least else 3 * seconds):
                break
            if precision and rounds >= least and _spread(works) <= precision:
                break
            # In a new order each round: what a provider leaves in caches and allocators helps or hinders its
            # successor, which must not always be the same one.
            for name in draw.sample(names, len(names)):
                for step, value in sample(works[name], clock, works[name].calls).items():
                    works[name].samples.setdefault(step, []).append(value)
            rounds += 1
    finally:
        gc.enable()
    return rounds


def _spread(works: dict[Hashable, Work]) -> float:
    """Return the widest half interval of a work's ratio to the first one, relative to the ratio."""
    first, *others = works.values()
    step = first.total or next(iter(first.steps))
    found = [ratio(work.samples[step], first.samples[step]) for work in others]
    if not all(r.interval for r in found):
        return math.inf
    return max(((r.interval[1] - r.interval[0]) / (2 * r.middle) for r in found), default=0.0)


class Ratio(NamedTuple):
    """The median of a ratio over the rounds, and the interval that holds the true median with a probability of at
    least :data:`CONFIDENCE`; None for less than six rounds, which have no such interval."""

    middle: float
    interval: tuple[float, float] | None


def ratio(values: list[float], others: list[float]) -> Ratio:
    """Return how ``values`` compare with ``others``, which were measured in the same rounds."""
    ratios = sorted(value / other for value, other in zip(values, others, strict=True))
    outside = _outside(len(ratios))
    interval = None if outside is None else (ratios[outside], ratios[-1 - outside])
    return Ratio(quantile(ratios, 0.5), interval)


@lru_cache
def _outside(n: int) -> int | None:
    """Return how many of ``n`` ordered values lie outside of the median's interval at each end; None if all of them
    are too few. With k outside, the interval misses if at most k values are on one side of the median, and that number
    is binomial, whatever the distribution of the values is."""

    def misses(k: int) -> float:
        return 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    k = 0
    while misses(k) <= 1 - CONFIDENCE:
        k += 1
    return k - 1 if k else None


def quantile(values: list[float], q: float) -> float:
    """Return the ``q`` quantile, interpolated between the nearest two."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
