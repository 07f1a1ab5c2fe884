"""Clocks, rounds, and the intervals of ratios."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import timing

ROOT = Path(__file__).resolve().parent.parent


def test_every_round_has_each_provider_once_in_a_new_order():
    order = []

    def work(name):
        return timing.Work(lambda: None, {"step": lambda _: order.append(name)})

    works = {name: work(name) for name in "abc"}

    class Clock:
        """Every call takes 2 ms, so that a sample is one call."""

        def mark(self):
            return len(order)

        def milliseconds(self, start, end):
            return 2.0 * (end - start)

        def wait(self):
            pass

    rounds = timing.measure(works, Clock(), seconds=0.0, least=0, most=3)
    assert rounds == 1
    order.clear()
    assert timing.measure(works, Clock(), seconds=60.0, most=20) == 20
    warmup, rounds = "".join(order[:6]), ["".join(order[i : i + 3]) for i in range(6, 66, 3)]
    assert warmup == "aabbcc"
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3  # a rotation has three orders, and each provider always the same successor
    assert all(work.samples == {"step": [2.0] * 20} for work in works.values())


def test_steps_are_timed_apart_and_summed():
    seen = []
    work = timing.Work(
        lambda: "prepared",
        {"forward": lambda state: seen.append(state) or "y", "backward": seen.append},
        "both",
    )
    result = timing.sample(work, timing.CpuClock(), 3)
    assert seen == ["prepared", "y"] * 3
    assert result["both"] == pytest.approx(result["forward"] + result["backward"])


def test_the_first_of_several_calls_may_go_untimed():
    class Clock(timing.CpuClock):
        now = 0

        def mark(self):
            return self.now

    def slow_at_first(state):
        clock.now += 10**6 * (9 if len(durations) % 3 == 0 else 1)
        durations.append(state)

    clock, durations = Clock(), []
    work = timing.Work(lambda: None, {"step": slow_at_first}, warm=True)
    assert timing.sample(work, clock, 2) == {"step": 1.0} and len(durations) == 3
    assert timing.sample(work, clock, 1) == {"step": 9.0} and len(durations) == 4


def test_quantiles_interpolate():
    assert timing.quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert timing.quantile([1.0, 2.0, 3.0], 0.2) == pytest.approx(1.4)
    assert timing.quantile([7.0], 0.8) == 7.0


def test_ratios_are_medians_within_rounds():
    assert timing.ratio([2.0, 4.0, 100.0], [1.0, 2.0, 1.0]) == (2.0, None)  # too few for an interval
    assert timing.ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6) == (3.5, (1.0, 6.0))
    assert timing.ratio([*range(1, 10)], [1] * 9) == (5.0, (2.0, 8.0))
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


def test_rounds_end_when_the_ratios_are_known():
    class Clock:
        """Work "b" takes 1.5 times as long as "a", give or take ``noise``."""

        def __init__(self, noise):
            self.noise, self.time, self.random = noise, 0.0, random.Random(0)

        def mark(self):
            return self.time

        def milliseconds(self, start, end):
            return end - start

        def wait(self):
            pass

    def rounds_of(noise, precision):
        clock = Clock(noise)

        def work(ms):
            def step(_):
                clock.time += ms * (1 + clock.random.uniform(-clock.noise, clock.noise))

            return timing.Work(lambda: None, {"step": step})

        works = {"a": work(10.0), "b": work(15.0)}
        count = timing.measure(works, clock, seconds=60.0, precision=precision)
        return count, timing.ratio(works["b"].samples["step"], works["a"].samples["step"])

    few, known = rounds_of(0.001, 0.01)
    many, known_less = rounds_of(0.1, 0.02)
    assert few == 7 and known.middle == pytest.approx(1.5, rel=0.01)
    assert 7 < many < 200 and known_less.interval[1] - known_less.interval[0] <= 2 * 0.02 * known_less.middle
    assert rounds_of(0.1, 0.0)[0] == 200


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
