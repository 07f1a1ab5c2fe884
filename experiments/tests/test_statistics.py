"""Means over seeds, gaps closed and their intervals, against cases done by hand."""

import math

import pytest
import torch

from experiments.harness import statistics


def test_the_gap_closed():
    assert statistics.gap_closed(1.7, lora=1.8, full=1.6) == pytest.approx(0.5)
    assert statistics.gap_closed(1.9, lora=1.8, full=1.6) == pytest.approx(-0.5)
    assert statistics.gap_closed(0.65, lora=0.6, full=0.7) == pytest.approx(0.5)  # where higher is better
    assert math.isnan(statistics.gap_closed(1.0, lora=1.0, full=1.0))


def test_the_bootstrap_of_two_seeds():
    # Resamples: (a, a), (a, b), (b, a), (b, b). The differences 0 and 1 give 0, 1/2, 1/2, 1 with 1/4 each.
    low, high = statistics.paired_bootstrap(lambda a, b: a - b, [3.0, 5.0], [3.0, 4.0])
    assert (low, high) == (0.0, 1.0)


def test_the_bootstrap_is_paired():
    # Seeds differ much, but in every seed the method is better by exactly 1.
    base = [0.0, 10.0, 20.0, 30.0]
    interval = statistics.paired_bootstrap(lambda a, b: a - b, [v - 1.0 for v in base], base)
    assert interval == (-1.0, -1.0)


def test_the_bootstrap_of_the_mean_agrees_with_its_standard_error():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = statistics.paired_bootstrap(lambda a: a, values)
    error = statistics.spread(values) / math.sqrt(len(values))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)


@pytest.mark.parametrize("columns", [([1.0],), ([1.0, 2.0], [1.0])])
def test_the_bootstrap_refuses_unequal_or_single_seeds(columns):
    with pytest.raises(ValueError, match="columns: expected the same two or more seeds"):
        statistics.paired_bootstrap(lambda *means: means[0], *columns)


def test_the_comparison_of_methods():
    scores = {"lora": [2.0, 2.2], "afa_silu": [1.9, 2.1], "full": [1.0, 1.2], "full_adapted": [1.5, 1.7]}
    result = statistics.compare(scores, "lora", ("full", "full_adapted"))
    assert result["lora"] == {"mean": pytest.approx(2.1), "spread": pytest.approx(0.2 / math.sqrt(2)), "seeds": 2}
    row = result["afa_silu"]
    assert row["minus_baseline"] == pytest.approx(-0.1) and row["better_seeds"] == 2
    assert row["gap_closed_to_full"] == pytest.approx(0.1)
    assert row["gap_closed_to_full_interval"] == pytest.approx((0.1, 0.1))
    assert row["gap_closed_to_full_adapted"] == pytest.approx(0.2)
    assert "gap_closed_to_full" not in result["full"]
    assert statistics.compare(scores, "lora", ("full",), higher_is_better=True)["afa_silu"]["better_seeds"] == 0
    assert result["full_adapted"]["gap_closed_to_full"] == pytest.approx(0.5)
