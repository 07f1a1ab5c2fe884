"""Clocks, rounds, and the intervals of ratios."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import timing

ROOT = Path(__file__).resolve().parents[2]


class Clock(timing.CpuClock):
    """A clock that stands still but for what :meth:`work` lets pass."""

    def __init__(self):
        self.now, self.order, self.random = 0, [], random.Random(0)

    def mark(self) -> int:
        return self.now

    def work(self, name: str, ms: float, noise: float = 0.0) -> timing.Work:
        """Return a work of one step of ``ms``, give or take the share ``noise``."""

        def step(_):
            self.order.append(name)
            self.now += round(1e6 * ms * (1 + self.random.uniform(-noise, noise)))

        return timing.Work(lambda: None, {"step": step})


def test_every_round_has_each_provider_once_in_a_new_order():
    clock = Clock()
    works = {name: clock.work(name, 2.0) for name in "abc"}  # so long that a sample is one call
    assert timing.measure(works, clock, seconds=0.0, least=0, most=3) == 1
    clock.order.clear()
    assert timing.measure(works, clock, seconds=60.0, most=20) == 20
    warmup, rounds = "".join(clock.order[:6]), ["".join(clock.order[i : i + 3]) for i in range(6, 66, 3)]
    assert warmup == "aabbcc"
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3  # a rotation has three orders, and each provider always the same successor
    assert all(work.samples == {"step": [2.0] * 20} for work in works.values())


def test_rounds_end_when_the_ratios_are_known():
    def rounds_of(noise, precision):
        clock = Clock()
        works = {"a": clock.work("a", 10.0, noise), "b": clock.work("b", 15.0, noise)}
        count = timing.measure(works, clock, seconds=60.0, precision=precision)
        return count, timing.ratio(works["b"].samples["step"], works["a"].samples["step"])

    few, known = rounds_of(0.001, 0.01)
    many, known_less = rounds_of(0.1, 0.02)
    assert few == 7 and known.middle == pytest.approx(1.5, rel=0.01)
    assert 7 < many < 200 and known_less.interval[1] - known_less.interval[0] <= 2 * 0.02 * known_less.middle
    assert rounds_of(0.1, 0.0)[0] == 200


def test_steps_are_timed_apart_and_summed():
    clock, seen = Clock(), []

    def step(state, ms):
        seen.append(state)
        clock.now += ms * 10**6
        return "y"

    steps = {"forward": lambda state: step(state, 2), "backward": lambda state: step(state, 3)}
    assert timing.sample(timing.Work(lambda: "prepared", steps, "both"), clock, 3) == {
        "forward": 2.0, "backward": 3.0, "both": 5.0
    }  # fmt: skip
    assert seen == ["prepared", "y"] * 3


def test_ratios_are_medians_within_rounds():
    assert timing.ratio([2.0, 4.0, 100.0], [1.0, 2.0, 1.0]) == (2.0, None)  # too few for an interval
    assert timing.ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6) == (3.5, (1.0, 6.0))
    assert timing.ratio([*range(1, 10)], [1] * 9) == (5.0, (2.0, 8.0))
    assert timing.quantile([3.0, 1.0, 2.0], 0.2) == pytest.approx(1.4)
    # The machine is half as fast in most rounds of one and in few of the other: medians differ, ratios do not.
    slow, fast = [2.0] * 12 + [1.0] * 8, [2.1] * 12 + [1.05] * 8
    assert timing.ratio(fast, slow).middle == pytest.approx(1.05)


@pytest.mark.parametrize("rounds", [7, 20, 101])
def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says(rounds):
    generator = torch.Generator().manual_seed(0)
    trials = 400
    held = widths = 0
    for _ in range(trials):
        noise = torch.randn(2, rounds, generator=generator).mul(0.05).exp()
        low, high = timing.ratio((1.2 * noise[0]).tolist(), noise[1].tolist()).interval
        held += low <= 1.2 <= high
        widths += high - low
    assert held / trials >= timing.CONFIDENCE - 0.03
    assert widths / trials < 0.6 / rounds**0.5  # nor by being wide


def test_kept_memory_costs_no_page_faults():
    script = """
import ctypes, resource, sys, torch
from bench import allocator
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault for 2 MB
assert allocator.use(sys.argv[1]) == sys.argv[1]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    torch.ones(1 << 24)
print(faults() - before)
"""
    run = [sys.executable, "-c", script]
    kept, system = (
        int(subprocess.run([*run, name], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for name in ("keep", "system")
    )
    assert kept < 100 < system
