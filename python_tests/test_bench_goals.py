"""What is made of the rows: verdicts on the goals, and the tables of the documents."""

import argparse

import pytest
from bench_rows import TINY, example_row

from bench import goals, pages, verdicts
from bench.cases import cases


def _goal_rows(interval=(0.8, 0.9)) -> list[dict]:
    """Rows of one goal's problem in which afa takes 0.85 of the others' time and a tenth more than the frozen layer."""
    base = example_row() | TINY._asdict() | dict(zip("mkn", (2048,) * 3, strict=True), r=16)
    base |= {"pass": "both", "cache": "hot", "launch": "eager", "floor_ms": 1.0}
    names = ("frozen", "peft", "eager", "afa", "afa.again")
    rows = []
    for name in names:
        tax = {} if name == "frozen" else {"tax": 0.1 if name == "afa" else 0.2, "tax_interval": [0.05, 0.15]}
        value, low, high = (1.01, 0.99, 1.03) if name == "afa.again" else (1.18, 1.1, 1.25)
        ratio = {"ratio": {"afa": value}, "ratio_interval": {"afa": [low, high]}}
        if name == "afa":
            ratio = {
                "ratio": {"peft": 0.85, "eager": 1.1},
                "ratio_interval": dict.fromkeys(("peft", "eager"), interval),
            }
        rows.append(base | {"provider": name, "floor_tax": 0.03} | tax | ratio)
    return rows


def test_goals_are_judged_from_rows():
    text = "\n".join(goals.report(_goal_rows()))
    assert "| fp32 2048 2048 2048 16 | 1 | 20.0 | 20.0 | **10.0** [5.0, 15.0] | 3.0 | +1.0 [-1.0, 3.0] |" in text
    assert "goals, adapter tax: 1 of 3 met" in text and "tax / floor 3.33, at most 1.5: not met" in text
    near = "\n".join(goals.report([row | {"floor_tax": 0.07} for row in _goal_rows()]))
    assert "tax / floor 1.43, at most 1.5: met" in near
    assert "afa / peft           0.850 [0.800, 0.900]: met" in text and "afa / eager          1.100" in text
    assert "of 1 intervals of its ratio to itself 1 include 1" in text and "distance from 1 is 1.0%" in text
    unsure = "\n".join(goals.report(_goal_rows((0.8, 1.2))))
    assert "[0.800, 1.200]: met, within the error" in unsure and ": not met, within the error" in unsure
    assert not list(goals.report([row | {"r": 17} for row in _goal_rows() if row["provider"] != "afa.again"]))


def test_geometric_means_are_of_the_shapes():
    rows = [row | {"scope": "branch"} for row in _goal_rows()]
    wide = [row | {"m": 4096, "k": 1024, "n": 4096} for row in _goal_rows()]
    wide = [row | {"scope": "branch", "ratio": {"afa": 4.72}} for row in wide if row["provider"] != "afa"]
    wide += [row | {"scope": "branch", "m": 4096, "k": 1024, "n": 4096} for row in rows if row["provider"] == "afa"]
    text = "\n".join(goals.report(rows + wide))
    assert "| geometric mean |  | 2.36 | - |  |" in text
    assert "eager / afa 2.36, at least 3.0: not met" in text and "afa.torch / afa" not in text


def test_a_mean_is_shown_beside_the_one_at_the_floor():
    rows = [row | {"scope": "branch", "p50_ms": 3.0, "floor_ms": 2.0} for row in _goal_rows()]
    wide = [row | {"m": 4096, "k": 1024, "n": 4096, "p50_ms": 12.0} for row in rows]
    assert "not met; eager / floor 3.00" in "\n".join(goals.report(rows + wide))


def test_the_pages_quote_the_recorded_results():
    files = [path for path in pages.FILES if path.exists()]
    sections = pages.sections(files)
    stems = {path.stem for path in files}
    recorded = {goal.title for goal in verdicts.GOALS if goal is not verdicts.STEP or "step" in stems}
    assert sections[pages.PERFORMANCE].keys() == recorded
    assert sections[pages.README].keys() == {"outcome", verdicts.LAYER.title}
    for page, texts in sections.items():
        text = page.read_text()
        assert pages.written(text, texts) == text, "python -m bench.goals --write"
        with pytest.raises(ValueError, match="adapter tax"):
            pages.written("", {verdicts.LAYER.title: texts[verdicts.LAYER.title]})


def test_the_short_table_marks_the_least_tax_whoever_has_it():
    assert pages.short_layer_table(_goal_rows())[-1] == (
        "| fp32 | 2048 | 2048 | 2048 | 16 | 1 ms | 20.0% | 20.0% | - | **10.0%** | 3.0% |"
    )
    rows = [row | {"tax": 0.05} if row["provider"] == "peft" else row for row in _goal_rows()]
    assert "| **5.0%** | 20.0% | - | 10.0% |" in pages.short_layer_table(rows)[-1]


def test_the_outcome_is_that_of_the_rows():
    rows = [row | {"scope": scope} for scope in ("layer", "branch") for row in _goal_rows()]
    for row in rows:
        row["tax"] = {"peft": 0.2, "eager": 0.25, "afa": 0.05}.get(row["provider"], 0)
    expected = """
        On a CPU an AFA-LoRA adapter adds 5.0% to 5.0% to the time that its frozen linear layer takes for forward and
        backward. The same adapter in ordinary PyTorch code adds 25.0% to 25.0%, and PEFT's plain LoRA adds 20.0% to
        20.0%. The branch alone, without the frozen layer, runs 1.2 to 1.2 times as fast as ordinary PyTorch code.
    """
    assert pages.summary(rows).split() == expected.split()
    assert not pages.summary(rows[:5])
    step = """
        On a CPU a training step of a Llama block (forward and backward, hidden size 1024, 512 tokens, rank 16) takes
        8.0% to 9.0% longer with AFA-LoRA adapters in all linear layers than the frozen block does. PEFT's plain LoRA
        takes 20.0% to 20.0% longer, and AFA-LoRA in ordinary PyTorch code 22.0% to 22.0%.
    """
    assert pages.summary(_step_rows()).split() == step.split()
    assert pages.summary(_step_rows() + rows).split() == (step + expected).split()
    assert not pages.summary([row for row in _step_rows() if row["provider"] != "peft"])


def test_the_presets_measure_every_problem_of_the_goals():
    axes = dict.fromkeys(("scopes", "shapes", "tokens", "ranks", "dtypes", "alphas"))
    options = {"adapter_dtype": None, "activation": "silu", "dropout": 0.0, "device": "cpu"}
    found = set()
    for preset in ("step", "goals", "decode"):
        for case in cases(argparse.Namespace(preset=preset, **axes, **options)):
            found.add((case.scope, case.dtype, case.alpha_t, case.m, case.k, case.n, case.r))
    assert found == {
        (goal.scope, dtype, alpha_t, *shape)
        for goal in verdicts.GOALS
        for dtype in ("f32", "bf16")
        for alpha_t in goal.alphas
        for shape in goal.shapes
    } | {("layer", dtype, 0.5, m, 4096, 4096, 16) for dtype in ("f32", "bf16") for m in (1, 4, 16)}


def _step_rows() -> list[dict]:
    """Rows of a training step at both alpha_t, in which this package adds less than half of what PEFT adds."""
    base = example_row() | TINY._asdict() | {"scope": "model", "layer": "llama-block", "pass": "both"}
    base |= {"m": 512, "k": 1024, "n": 2816, "r": 16, "cache": "hot", "launch": "eager"}
    taxes = {"peft": (0.2, 0.01), "eager": (0.22, 0.01), "afa": (0.09, 0.02), "afa.peft": (0.15, 0.06)}
    rows = []
    for alpha_t in (0.5, 0.0):
        rows.append(base | {"provider": "frozen", "alpha_t": alpha_t, "p50_ms": 100.0})
        again = {"ratio": {"frozen": 0.99}, "ratio_interval": {"frozen": [0.98, 0.995]}}
        rows.append(base | {"provider": "frozen.again", "alpha_t": alpha_t} | again)
        for name, (value, half) in taxes.items():
            tax = value - 0.01 if name == "afa" and not alpha_t else value
            row = base | {"provider": name, "alpha_t": alpha_t, "tax": tax, "tax_interval": [tax - half, tax + half]}
            share = tax / 0.2
            row |= {"peft_share": share, "peft_share_interval": [share - 0.1, share + (0.05 if alpha_t else 0.3)]}
            rows.append(row)
    return rows


def test_the_tax_of_a_step_is_judged_beside_pefts():
    text = "\n".join(goals.report(_step_rows()))
    assert "goals, training step: 2 of 4 met" in text
    beside = "9.0%, PEFT's 20.0%, intervals apart; ratio 0.45 [0.35, 0.50], at most 0.6: met\n"
    assert f"fp32 0.5 512 1024 2816 16   tax of afa {beside}" in text
    assert "afa.peft 15.0%, PEFT's 20.0%, intervals overlap; ratio 0.75 [0.65, 0.80], at most 0.6: not met\n" in text
    assert "ratio 0.40 [0.30, 0.70], at most 0.6: met, within the error" in text
    assert "of 2 intervals of its ratio to itself 0 include 1" in text and "distance from 1 is 1.0%" in text
    row = "| fp32 | 0 | 100 | 20.0 [19.0, 21.0] | 22.0 [21.0, 23.0] | **8.0** [6.0, 10.0] | 15.0 [9.0, 21.0] | 1.0 |"
    assert row in text
    short = [{k: v for k, v in row.items() if not k.startswith(("tax", "peft_"))} for row in _step_rows()]
    assert "training step" not in "\n".join(goals.report(short))  # too few rounds


def _identity_row(value: float, low: float, high: float, **changes: object) -> dict:
    ratio = {"ratio": {"afa": value, "peft": value - 0.1}}
    ratio |= {"ratio_interval": {"afa": [low, high], "peft": [value - 0.15, value - 0.05]}}
    base = example_row() | TINY._asdict() | {"cache": "hot", "launch": "eager", "pass": "both"}
    return base | {"provider": "afa.identity"} | ratio | changes


def test_identity_is_compared_with_the_blend_over_all_files():
    rows = [_identity_row(0.99, 0.98, 1.0), _identity_row(1.03, 1.0, 1.06, m=64)]
    text = "\n".join(goals.report(rows))
    assert "goals, alpha_t = 0 over 0.5: 1 of 2 met" in text
    assert "geometric mean of 2 1.010 [0.990, 1.030], at most 1.00: not met, within the error" in text
    assert "largest 1.030 [1.000, 1.060] (f32 64 24 56 4), at most 1.05: met, within the error" in text
    other = [_identity_row(1.2, 1.1, 1.3, scope="branch"), _identity_row(2.0, 1.9, 2.1, **{"pass": "forward"})]
    text = "\n".join(goals.report(rows, other))
    assert "branch, both" in text and "geometric mean of 3 1.070 [1.025, 1.113], at most 1.00: not met" in text
    assert "largest 1.200 [1.100, 1.300] (f32 40 24 56 4), at most 1.05: not met\n" in text + "\n"


def test_how_many_are_behind_is_counted_at_identity_too():
    shape = dict(zip("mkn", (2048,) * 3, strict=True), r=16)
    rows = [*_goal_rows(), _identity_row(1.0, 0.99, 1.01, **shape)]
    text = "\n".join(goals.report(rows))
    assert "afa at 0 / peft      0.900 [0.850, 0.950]: met" in text
    # peft and, not behind, eager at 0.5; peft at 0.
    assert "adapter tax: others behind ours in 2 of 3 comparisons, in 2 by more than the error" in text
