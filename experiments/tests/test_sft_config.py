"""Settings of the comparison of fine-tunings, and text of one's own."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from experiments import sft
from experiments.harness import sft_config, user_data
from experiments.tests.sft_helpers import RATES, ROOT, byte_llama, tiny_settings, write_config


@pytest.fixture
def config_file(tmp_path) -> Path:
    return write_config(tiny_settings(byte_llama(tmp_path / "model"), tmp_path), tmp_path / "tiny.yaml")


def test_flags_override_the_file(config_file):
    parser = sft.arguments(["--config", str(config_file), "--steps", "7", "--methods", "lora", "full", "--bf16"])
    settings = sft_config.from_flags(parser)
    assert (settings.steps, settings.methods, settings.bf16) == (7, ("lora", "full"), True)
    assert settings.length == 16 and settings.learning_rates == RATES
    chosen = sft.arguments(["--config", str(config_file), "--learning-rate", "lora=2e-3", "full=1e-5"])
    assert sft_config.from_flags(chosen).learning_rates == RATES | {"lora": 2e-3, "full": 1e-5}


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rates: {lora: 1e-3}\ngrids: {lora: [1e-3, 0.01]}\nhead_learning_rate: 3e-3\n")
    settings = sft_config.read(file)
    assert settings.learning_rates == {"lora": 1e-3} and settings.grids == {"lora": [1e-3, 0.01]}
    assert settings.head_learning_rate == 3e-3


@pytest.mark.parametrize("file", sorted((ROOT / "experiments" / "configs").glob("sft_*.yaml")), ids=lambda f: f.name)
def test_the_published_settings_are_valid_and_every_method_is_tuned_alike(file):
    settings = sft_config.read(file)
    assert len({len(grid) for grid in settings.grids.values()}) == 1
    for method, rate in settings.learning_rates.items():
        assert rate in settings.grids[method]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "stepz: unknown setting"),
        ("steps: many", "steps: expected a whole number, got 'many'"),
        ("steps: 0", "steps: expected at least 1, got 0"),
        ("methods: lora", "methods: expected a list"),
        ("methods: [lora, lorra]", "methods: expected some of"),
        ("learning_rates: {lora: fast}", "learning_rates: expected a number, got 'fast'"),
        ("learning_rates: {lorra: 1}", "learning_rates: expected rates of"),
        ("learning_rates: {lora: -1.0}", "learning_rates: expected positive rates"),
        ("task: rl", "task: expected one of lm, classification, got 'rl'"),
        ("tuning_seed: 3", "tuning_seed: expected a seed that the 5 runs do not use, got 3"),
        ("bf16: 1", "bf16: expected true or false, got 1"),
        ("schedule: fast", "kind: expected one of linear"),
        ("anneal_end_frac: 2.0", "end_frac: expected a fraction in \\[0, 1\\], got 2.0"),
        ("keep_layers: 2", "keep_layers: expected nothing but for classification, got 2"),
        ("- a", "config: expected entries such as 'steps: 100'"),
        ("a: [", "config: .* is no YAML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        sft_config.read(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="config: no file"):
        sft_config.read(tmp_path / "none.yaml")
    with pytest.raises(SystemExit, match="sft.py: config: no file"):
        sft.main(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit, match="learning_rate: expected METHOD=RATE, got 'lora'"):
        sft.main(["--learning-rate", "lora"])


def test_text_and_rows_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    assert {part: len(t) for part, t in user_data.texts(str(tmp_path / "a.txt"), "text").items()} == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    for name in ("a.jsonl", "a.csv"):
        parts = user_data.rows_of(str(tmp_path / name), ("text", "label"))
        assert [row for part in user_data.PARTS for row in parts[part]] == rows
        assert len(parts["test"]) == len(parts["validation"]) == 2
        with pytest.raises(ValueError, match="data: expected a column 'body' in"):
            user_data.rows_of(str(tmp_path / name), ("body",))
    with pytest.raises(ValueError, match="data: no file"):
        user_data.texts(str(tmp_path / "none.txt"), "text")
    with pytest.raises(ValueError, match="data: expected a .csv or .jsonl file"):
        user_data.rows_of(str(tmp_path / "a.txt"), ("text",))


def test_a_data_set_of_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="data: 'someone/something' is no file here.*pip install datasets"):
        user_data.texts("someone/something", "text")
