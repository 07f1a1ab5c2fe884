"""Settings, and the statistics against cases done by hand and the published results."""

import json
import math

import pytest
import yaml

pytest.importorskip("scipy")
pytest.importorskip("trl")
pytest.importorskip("matplotlib")

from experiments import results, rl, sft, speculative
from experiments.settings import parse
from experiments.tests.conftest import ROOT

CONFIGS = {
    "sft_lm": sft.SFTSettings,
    "sft_classification": sft.SFTSettings,
    "rl": rl.RLSettings,
    "speculative": speculative.DraftSettings,
}


def config(name: str) -> list[str]:
    return ["--config", str(ROOT / "experiments" / "configs" / f"{name}.yaml")]


def test_the_bootstrap_is_paired_and_gives_percentiles():
    # Two seeds are drawn as (a, a), (a, b), (b, a), (b, b): the differences 0 and 1 give 0, 1/2, 1/2, 1.
    assert results.interval(lambda a, b: a - b, [3.0, 5.0], [3.0, 4.0]) == (0.0, 1.0)
    # Seeds differ much, but in every seed the method is better by exactly 1.
    base = [0.0, 10.0, 20.0, 30.0]
    assert results.interval(lambda a, b: a - b, [v - 1.0 for v in base], base) == (-1.0, -1.0)


def test_the_comparison_of_methods():
    scores = {"lora": [2.0, 2.2], "afa_silu": [1.9, 2.1], "full": [1.0, 1.2], "full_adapted": [1.5, 1.7]}
    made = results.compare(scores)
    assert made["lora"] == {"mean": pytest.approx(2.1), "spread": pytest.approx(0.2 / math.sqrt(2)), "seeds": 2}
    row = made["afa_silu"]
    assert row["minus_baseline"] == pytest.approx(-0.1) and row["better_seeds"] == 2
    assert row["gap_closed_to_full"] == pytest.approx(0.1)
    assert row["gap_closed_to_full_interval"] == pytest.approx((0.1, 0.1))
    assert row["gap_closed_to_full_adapted"] == pytest.approx(0.2) and "gap_closed_to_full" not in made["full"]
    assert results.compare(scores, higher_is_better=True)["afa_silu"]["better_seeds"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_statistics_follow_from_the_published_scores(name):
    published = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    higher = {"accuracy", *rl.VerifiedAnswers.higher_is_better, *speculative.Drafting.higher_is_better}
    pages = next(iter(published["summary"]))
    for metric, summary in published["summary"].items():
        scores = {
            method: [r["score"][metric] for r in published["runs"] if r["method"] == method] for method in summary
        }
        for method, row in results.compare(scores, metric in higher).items():
            # Where a draw has the same accuracy of LoRA and full fine-tuning, rounding decides whether there is a gap.
            for entry, value in summary[method].items() if metric == pages else [("mean", summary[method]["mean"])]:
                assert row[entry] == pytest.approx(value, nan_ok=True), (metric, method, entry)


@pytest.mark.parametrize("name", ["annealing_lm", "annealing_classification"])
def test_the_published_intervals_of_annealing_follow_from_the_published_scores(name):
    published = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text(encoding="utf-8"))["studies"]
    rows = [row for study, rows in published.items() if study != "inputs" for row in rows if row["against"]]
    for row in rows:
        base = [score - difference for score, difference in zip(row["scores"], row["differences"], strict=True)]
        assert results.interval(lambda a, b: a - b, row["scores"], base) == pytest.approx(row["interval"], abs=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_settings_are_those_of_the_file_and_every_method_is_tuned_alike(name):
    settings, _, _ = parse(CONFIGS[name], config(name), "x")
    assert len({len(grid) for grid in settings.grids.values()}) == 1
    for method, rate in settings.learning_rates.items():
        assert rate in settings.grids[method]
    published = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text(encoding="utf-8"))["settings"]
    for entry, value in vars(settings).items():
        assert value == published.get(entry, value), entry


def test_the_best_rate_and_what_diverged():
    rows = [{"method": "lora", "learning_rate": r, "m": m} for r, m in ((1.0, 2.0), (2.0, 1.0), (3.0, math.nan))]
    assert results.best_rates(rows, "m", higher_is_better=False) == {"lora": 2.0}
    assert results.best_rates(rows, "m", higher_is_better=True) == {"lora": 1.0}


def test_flags_override_the_file():
    flags = ["--steps", "7", "--methods", "lora", "full", "--bf16", "--learning-rates", '{"lora": 2e-3}', "--tune"]
    settings, tune, quiet = parse(sft.SFTSettings, [*config("sft_lm"), *flags], "x")
    assert (settings.steps, settings.methods, settings.bf16, settings.length) == (7, ["lora", "full"], True, 96)
    assert settings.learning_rates == {"lora": 2e-3} and (tune, quiet) == (True, False)


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("sft_lm", {"stepz": 3}, "Unknown arguments from config file: .*stepz"),
        ("sft_lm", {"steps": 0}, "steps: expected a whole number, at least 1, got 0"),
        ("sft_lm", {"methods": ["lorra"]}, "methods: expected some of frozen, lora"),
        ("sft_lm", {"learning_rates": {"lorra": 1}}, "learning_rates: expected rates of some of"),
        ("sft_lm", {"tuning_seed": 3}, "tuning_seed: expected a seed that the 5 runs do not use, got 3"),
        ("sft_lm", {"schedule": "fast"}, "kind: expected one of linear"),
        ("rl", {"completions": 1}, "completions: expected 2 or more that divide batch_size=128, got 1"),
        ("speculative", {"prompt_length": 128}, "prompt_length: expected 1 or more, less than length=128"),
    ],
)
def test_a_wrong_setting_is_named(kind, entries, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(entries))
    with pytest.raises(ValueError, match=message):
        parse(CONFIGS[kind], ["--config", str(file)], "x")
    with pytest.raises(SystemExit, match=r"sft.py: .*No such file.*none.yaml"):
        sft.main(["--config", str(tmp_path / "none.yaml")])
