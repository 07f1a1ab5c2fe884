"""What is made of the rows: verdicts on the goals, and the tables of the documents."""

import pytest
from bench_rows import TINY, example_row

from bench import goals


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
    assert "afa / peft       0.850 [0.800, 0.900]: met" in text and "afa / eager      1.100" in text
    assert "of 1 intervals of its ratio to itself 1 include 1" in text and "distance from 1 is 1.0%" in text
    unsure = "\n".join(goals.report(_goal_rows((0.8, 1.2))))
    assert "[0.800, 1.200]: met, within the error" in unsure and ": not met, within the error" in unsure
    assert ": met, without an interval" in "\n".join(goals.report(_goal_rows(())))
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
    sections = goals.sections(path for path in goals.FILES if path.exists())
    assert sections[goals.PERFORMANCE].keys() == {goal.title for goal in goals.GOALS}
    assert sections[goals.README].keys() == {"outcome", goals.LAYER.title}
    for page, texts in sections.items():
        text = page.read_text()
        assert goals.written(text, texts) == text, "python -m bench.goals --write"
        with pytest.raises(ValueError, match="adapter tax"):
            goals.written("", {goals.LAYER.title: texts[goals.LAYER.title]})


def test_the_short_table_marks_the_least_tax_whoever_has_it():
    assert goals._short_layer_table(_goal_rows())[-1] == (
        "| fp32 | 2048 | 2048 | 2048 | 16 | 1 ms | 20.0% | 20.0% | - | **10.0%** | 3.0% |"
    )
    rows = [row | {"tax": 0.05} if row["provider"] == "peft" else row for row in _goal_rows()]
    assert "| **5.0%** | 20.0% | - | 10.0% |" in goals._short_layer_table(rows)[-1]


def test_the_outcome_is_that_of_the_rows():
    rows = [row | {"scope": scope} for scope in ("layer", "branch") for row in _goal_rows()]
    for row in rows:
        row["tax"] = {"peft": 0.2, "eager": 0.25, "afa": 0.05}.get(row["provider"], 0)
    expected = """
        On a CPU an AFA-LoRA adapter adds 5.0% to 5.0% to the time that its frozen linear layer takes for forward and
        backward. The same adapter in ordinary PyTorch code adds 25.0% to 25.0%, and PEFT's plain LoRA adds 20.0% to
        20.0%. The branch alone, without the frozen layer, runs 1.2 to 1.2 times as fast as ordinary PyTorch code.
    """
    assert goals._summary(rows).split() == expected.split()
    assert not goals._summary(rows[:5])
