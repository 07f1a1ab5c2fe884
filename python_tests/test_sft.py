"""The comparison of fine-tunings: settings, resume, the numbers of its table, the check of the merge."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import afa_kernels as afa
import annealing
import pretrain
import sft
from afa_examples import (
    adaptation,
    bytelm,
    keywords,
    prototypes,
    sft_config,
    sft_tasks,
    sft_training,
    statistics,
    user_data,
)

ROOT = Path(__file__).resolve().parents[1]
RATES = {"lora": 1e-2, "afa_relu": 1e-2, "afa_silu": 1e-2, "afa_gelu": 1e-2, "full_adapted": 1e-3, "full": 1e-3}
STEPS = 10


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A byte-level Llama of one layer with random weights."""
    folder = tmp_path_factory.mktemp("byte-llama")
    bytelm.new_model(32, 1, seed=0).save_pretrained(folder)
    bytelm.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_folder, tmp_path) -> sft_config.Settings:
    return sft_config.make(
        {
            "model": str(model_folder),
            "data": str(license_text(tmp_path)),
            "steps": STEPS,
            "batch_size": 2,
            "length": 16,
            "evaluate_every": 5,
            "curve_examples": 2,
            "test_examples": 4,
            "checkpoint_every": 3,
            "seeds": 2,
            "learning_rates": RATES,
            "output": str(tmp_path / "out"),
        }
    )


@pytest.fixture(autouse=True)
def _a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def license_text(folder: Path) -> Path:
    file = folder / "license.txt"
    file.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    return file


@pytest.fixture
def config_file(settings, tmp_path) -> Path:
    file = tmp_path / "tiny.yaml"
    entries = {name: value for name, value in settings.as_dict().items() if value is not None}
    file.write_text(yaml.safe_dump(entries), encoding="utf-8")
    return file


def cell(settings, method: str, seed: int = 0) -> sft_training.Cell:
    return sft_training.Cell(method, seed, RATES[method], settings)


# Settings


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


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "configs").glob("sft_*.yaml")), ids=lambda f: f.name)
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


# What trains


@pytest.mark.parametrize("name", adaptation.METHODS)
def test_a_method_trains_what_it_says_and_nothing_else_changes(name, settings):
    task = sft_tasks.make(settings)
    rate = RATES.get(name, 0.0)
    run = sft_training.Run(sft_training.Cell(name, 0, rate, settings), task, Accelerator(cpu=True))
    before = {key: p.detach().clone() for key, p in run.plain.named_parameters()}
    run.train(Path(settings.output) / "none", quiet=True)
    changed = {key for key, p in run.plain.named_parameters() if not torch.equal(p, before[key])}
    trained = {key for key, p in run.plain.named_parameters() if p.requires_grad}
    assert changed == trained
    assert len(run.adapted) == 7
    if name == "frozen":
        assert not trained
    elif name == "full":
        assert trained == set(before)
    elif name == "full_adapted":
        assert trained == {f"{layer}.weight" for layer in run.adapted}
    else:
        assert trained == {f"{layer}.lora_{side}" for layer in run.adapted for side in "ab"}
        assert all(m.alpha_t == 0.0 for m in run.plain.modules() if isinstance(m, afa.AFALinear))
        starts_at = 0.0 if name == "lora" else 1.0
        assert run.progress.alpha_t[0] == starts_at and run.progress.alpha_t[6:] == [0.0] * 4


# Resume


@pytest.mark.parametrize("method", ["lora", "afa_silu", "full"])
def test_an_interrupted_run_goes_on_bit_by_bit(method, settings, tmp_path, monkeypatch):
    task, accelerator = sft_tasks.make(settings), Accelerator(cpu=True)
    whole = sft_training.run(cell(settings, method), task, accelerator, quiet=True)

    elsewhere = dataclasses.replace(settings, output=str(tmp_path / "again"))
    one_step, taken = sft_training.Run.one_step, []

    def interrupted(self):
        if self.step == 7 and not taken:
            raise KeyboardInterrupt
        one_step(self)

    def counted(self):
        taken.append(self.step)
        one_step(self)

    monkeypatch.setattr(sft_training.Run, "one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sft_training.run(cell(elsewhere, method), task, accelerator, quiet=True)
    monkeypatch.setattr(sft_training.Run, "one_step", counted)
    torch.manual_seed(99)  # nothing may depend on what was drawn meanwhile
    resumed = sft_training.run(cell(elsewhere, method), task, accelerator, quiet=True)
    assert taken == [6, 7, 8, 9]
    assert resumed["score"] == whole["score"]
    for name in ("loss", "alpha_t", "steps", "scores"):
        assert resumed["progress"][name] == whole["progress"][name], name
    assert not list(Path(elsewhere.output).rglob("*.checkpoint"))


def test_a_finished_cell_is_not_run_again_and_other_settings_are(settings, monkeypatch):
    task, accelerator = sft_tasks.make(settings), Accelerator(cpu=True)
    first = sft_training.run(cell(settings, "lora"), task, accelerator, quiet=True)

    def refuse(self):
        raise AssertionError("trained again")

    monkeypatch.setattr(sft_training.Run, "one_step", refuse)
    again = sft_training.run(cell(settings, "lora"), task, accelerator, quiet=True)
    assert again == json.loads(json.dumps(first))
    # Annealing is nothing to a LoRA; the rank is.
    same = dataclasses.replace(settings, schedule="cosine", seeds=5)
    assert sft_training.run(cell(same, "lora"), task, accelerator, quiet=True) == again
    for other in ({"r": 3}, {"steps": 11}):
        with pytest.raises(AssertionError, match="trained again"):
            sft_training.run(cell(dataclasses.replace(settings, **other), "lora"), task, accelerator, quiet=True)
    with pytest.raises(AssertionError, match="trained again"):
        sft_training.run(cell(settings, "lora", seed=1), task, accelerator, quiet=True)


# The numbers of the table


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
    assert result["full_adapted"]["gap_closed_to_full"] == pytest.approx(0.5)


def test_the_best_rate_is_that_of_the_lowest_score():
    rows = [
        {"method": "lora", "learning_rate": rate, "loss": loss}
        for rate, loss in ((1e-3, 2.0), (1e-2, 1.5), (1e-1, math.nan))
    ]
    assert sft.best_rates(rows, "loss") == {"lora": 1e-2}


# The command


def test_the_command_writes_table_picture_adapter_and_a_merged_model(config_file, settings, capsys):
    methods = ("frozen", "lora", "afa_relu", "afa_silu", "full_adapted", "full")
    assert sft.main(["--config", str(config_file), "--quiet", "--methods", *methods]) == 0
    printed = capsys.readouterr().out
    output = Path(settings.output)
    result = json.loads((output / "sft.json").read_text())
    assert [(r["seed"], r["method"]) for r in result["runs"]] == [
        (seed, method) for seed in range(2) for method in methods
    ]
    row = result["summary"]["nats per byte"]["afa_relu"]
    scores = {
        method: [r["score"]["nats per byte"] for r in result["runs"] if r["method"] == method] for method in methods
    }
    assert row["mean"] == pytest.approx(sum(scores["afa_relu"]) / 2)
    expected = statistics.gap_closed(*(sum(scores[name]) / 2 for name in ("afa_relu", "lora", "full")))
    assert row["gap_closed_to_full"] == pytest.approx(expected)
    assert f"{row['mean']:.4f}" in printed and "| AFA-LoRA relu |" in printed
    assert (output / "sft.png").read_bytes().startswith(b"\x89PNG")
    for method in ("lora", "afa_relu", "afa_silu"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            f.name for f in (output / "adapter" / method).iterdir()
        }
        run = next(r for r in result["runs"] if r["method"] == method and r["seed"] == 0)
        assert set(run["merge"]["largest_difference"]) == {"merged", "loaded again"}
    # The merged model, loaded by transformers alone, scores what the annealed model scored.
    task = sft_tasks.make(settings)
    merged = task.load(output / "merged" / "afa_silu")
    assert task.score(merged, "test", 4)["nats per byte"] == pytest.approx(scores["afa_silu"][0], abs=1e-5)


def test_the_grid_is_run_on_a_seed_and_a_split_of_its_own(config_file, settings, capsys):
    grids = "grids: {lora: [1e-2, 3e-2], full: [1e-3, 3e-3]}\n"
    config_file.write_text(config_file.read_text().replace("grids: {}\n", grids))
    assert sft.main(["--config", str(config_file), "--quiet", "--tune"]) == 0
    result = json.loads((Path(settings.output) / "tune.json").read_text())
    assert set(result["best"]) == {"lora", "full"} and len(result["rows"]) == 4
    cells = [json.loads(f.read_text()) for f in (Path(settings.output) / "cells").glob("*.json")]
    assert {(c["seed"], c["identity"]["part"]) for c in cells} == {(1000, "validation")}
    assert "(an end of the grid)" in capsys.readouterr().out


def test_a_method_without_a_rate_is_refused(settings, config_file):
    text = config_file.read_text().replace("  lora: 0.01\n", "")
    config_file.write_text(text)
    with pytest.raises(SystemExit, match="learning_rates: none for lora; --tune chooses them"):
        sft.main(["--config", str(config_file), "--quiet"])


def test_a_merge_that_changes_the_function_fails_the_command(config_file, monkeypatch, capsys):
    merge = afa.merge

    def wrong(model):
        merge(model)
        with torch.no_grad():
            model.get_submodule("model.layers.0.mlp.up_proj").base_layer.weight.mul_(1.01)

    monkeypatch.setattr(afa, "merge", wrong)
    assert sft.main(["--config", str(config_file), "--quiet", "--methods", "afa_silu"]) == 1
    assert "FAILED: afa_silu: the logits of the merged model are off by" in capsys.readouterr().err
    output = Path(sft_config.read(config_file).output)
    assert not list(output.glob("cells/*.json"))  # it does not count as finished


def test_a_merge_that_is_not_saved_right_fails(settings, tmp_path, monkeypatch):
    task = sft_tasks.make(settings)
    model = task.model(0)
    afa.inject(model, r=2)
    for module in model.modules():
        if isinstance(module, afa.AFALinear):
            torch.nn.init.normal_(module.lora_b, std=0.1)
    afa.set_alpha_t(model, 0.0)
    monkeypatch.setattr(task, "load", lambda folder: task.model(0))  # without what was learned
    with pytest.raises(sft_training.MergeMismatch, match="x: the logits of the loaded again model"):
        sft_training.merge_check(model, task, "x", tmp_path, Accelerator(cpu=True))


@pytest.mark.parametrize("task", ["lm", "classification"])
def test_bfloat16_keeps_what_trains_in_float32(task, settings, tmp_path):
    changes = {"bf16": True}
    if task == "classification":
        changes |= {"task": task, "model": str(tiny_bert(tmp_path)), "data": str(rows_of_two_labels(tmp_path))}
    settings = dataclasses.replace(settings, **changes)
    made, accelerator = sft_tasks.make(settings), Accelerator(mixed_precision="bf16", cpu=True)
    run = sft_training.Run(cell(settings, "afa_silu"), made, accelerator)
    run.train(tmp_path / "none", quiet=True)
    dtypes = {p.requires_grad: set() for p in run.plain.parameters()}
    for p in run.plain.parameters():
        dtypes[p.requires_grad].add(p.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    assert all(map(math.isfinite, run.progress.loss))
    result = sft_training.merge_check(run.plain, made, "afa_silu", tmp_path / "x", accelerator)
    assert set(result["largest_difference"]) == {"merged", "loaded again"}


def tiny_bert(folder: Path) -> Path:
    """A BERT of two layers with random weights that reads bytes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=bytelm.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(config).save_pretrained(folder / "bert")
    bytelm.tokenizer().save_pretrained(folder / "bert")
    return folder / "bert"


def rows_of_two_labels(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    rows = [{"text": f"{'ab'[i % 2] * 4} {i}", "label": "ab"[i % 2]} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_classification_of_rows_learns_them(settings, tmp_path):
    entries = {"task": "classification", "model": str(tiny_bert(tmp_path)), "data": str(rows_of_two_labels(tmp_path))}
    changes = {"keep_layers": 1, "steps": 40, "batch_size": 8, "test_examples": None, "methods": ("frozen", "lora")}
    settings = dataclasses.replace(settings, **entries, **changes)
    task, accelerator = sft_tasks.make(settings), Accelerator(cpu=True)
    result = sft_training.run(cell(settings, "lora"), task, accelerator, quiet=True, save_merged=True)
    assert result["score"]["accuracy"] == 1.0 and result["score"]["nats per label"] < 0.5
    merged = task.load(Path(settings.output) / "merged" / "lora")
    assert len(merged.encoder.encoder.layer) == 1
    assert task.score(merged, "test")["nats per label"] == pytest.approx(result["score"]["nats per label"], abs=1e-4)
    with pytest.raises(ValueError, match="keep_layers: expected at most the 2 layers"):
        sft_tasks.make(dataclasses.replace(settings, keep_layers=3)).model(0)


def test_batches_of_examples_depend_on_seed_and_step_alone(settings, tmp_path):
    entries = {"task": "classification", "model": str(tiny_bert(tmp_path)), "data": str(rows_of_two_labels(tmp_path))}
    task = sft_tasks.make(dataclasses.replace(settings, **entries))
    epoch = [task.batch(6, 0, step).input_ids for step in range(8)]  # 48 examples to train
    again = task.batch(6, 0, 5).input_ids
    assert torch.equal(again, epoch[5]) and not torch.equal(epoch[0][:, :4], task.batch(6, 1, 0).input_ids[:, :4])
    assert len({tuple(row[row > 1].tolist()) for batch in epoch for row in batch}) == 48


@pytest.mark.slow
def test_two_processes_learn_as_one_does(config_file, settings, tmp_path):
    def command(*launcher: str, output: str) -> list[dict]:
        options = ("--config", config_file, "--quiet", "--methods", "lora", "afa_silu", "--output", tmp_path / output)
        subprocess.run([*launcher, str(ROOT / "examples" / "sft.py"), *map(str, options)], check=True)
        return json.loads((tmp_path / output / "sft.json").read_text())["runs"]

    one = command(sys.executable, output="one")
    two = command(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", output="two")
    for a, b in zip(one, two, strict=True):
        assert (a["processes"], b["processes"]) == (1, 2)
        assert b["score"]["nats per byte"] == pytest.approx(a["score"]["nats per byte"], rel=1e-3)


# Text of one's own, and the tasks


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


def test_without_the_pretrained_model_the_command_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run python examples/pretrain.py first"):
        sft.main(["--quiet"])


def test_a_model_with_tokens_of_its_own(settings, tmp_path):
    import tokenizers
    import transformers

    splitter = tokenizers.pre_tokenizers.Whitespace()
    words = sorted({word for word, _ in splitter.pre_tokenize_str(license_text(tmp_path).read_text())})
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, "[UNK]")
    )
    tokenizer.pre_tokenizer = splitter
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "words")
    config = bytelm.config(32, 1)
    config.vocab_size = len(words) + 1
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "words")
    task = sft_tasks.make(dataclasses.replace(settings, model=str(tmp_path / "words")))
    assert task.metric == "nats per token"
    assert set(task.score(task.model(0), "test", 2)) == {"nats per token"}
    assert max(part.max() for part in task.parts.values()) > bytelm.VOCABULARY
    with pytest.raises(ValueError, match="data: expected at least 10000 tokens to train, got"):
        sft_tasks.make(dataclasses.replace(settings, length=10_000))


def test_a_hidden_word_is_gone_from_its_place():
    examples = [keywords.data.Example(f"def f{i}(x): return x if x else {i}", "m", ("f", "f")) for i in range(40)]
    hidden = keywords.hide(examples, "[MASK]", seed=0)
    assert len(hidden) == 9  # no label more than twice as often as an equal share
    for example in hidden:
        assert example.text.count("[MASK]") == 1 and example.text.startswith("def f")
        assert example.text.replace("[MASK]", example.label) in {e.text for e in examples}
    assert {e.label for e in hidden} == {"return", "if", "else"}


def test_the_parts_of_the_topics_share_next_to_nothing():
    train, validation, test = (text.split("\n\n") for text in bytelm.topic_texts().values())
    for held_out, others in ((validation, train), (test, train), (test, validation)):
        shared = sum(len(p) for p in held_out if p in set(others))
        assert shared < 0.04 * sum(map(len, held_out))


def test_batches_depend_on_seed_and_step_alone():
    ids = torch.arange(1000)
    one = bytelm.batch(ids, 4, 10, seed=1, step=5)
    assert one.shape == (4, 10) and torch.equal(one, bytelm.batch(ids, 4, 10, seed=1, step=5))
    assert torch.equal(one - one[:, :1], torch.arange(10).expand(4, 10))
    for other in ((1, 6), (2, 5)):
        assert not torch.equal(one, bytelm.batch(ids, 4, 10, *other))


# Pretraining


def test_pretraining_makes_a_folder_that_transformers_loads(tmp_path, monkeypatch, capsys):
    import transformers

    ids = bytelm.encode("def f(x):\n    return x\n" * 200)
    monkeypatch.setattr(bytelm, "standard_library_source", lambda: (ids, ids[:400]))
    options = ["--hidden", "32", "--layers", "1", "--steps", "30", "--length", "32", "--output", str(tmp_path / "m")]
    assert pretrain.main(options) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("def", add_special_tokens=False)["input_ids"] == bytelm.encode("def").tolist()
    assert bytelm.nats_per_byte(model, ids[:400], 32) < 0.7 * math.log(bytelm.VOCABULARY)
    made = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    assert pretrain.main(options) == 0  # kept
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(SystemExit, match="was made with"):
        pretrain.main([*options, "--seed", "1"])


@pytest.mark.parametrize(("hidden", "layers", "name"), [(48, 1, "hidden"), (0, 1, "hidden"), (32, 0, "layers")])
def test_a_model_of_no_size_is_refused(hidden, layers, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        bytelm.config(hidden, layers)


# Annealing


def test_a_blend_with_gain_has_slope_one_at_zero():
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    smooth = [m for m in prototypes.PROTOTYPES.values() if m.activation != "relu"]
    for method in smooth:
        for alpha_t in (0.0, 0.5, 1.0):
            phi = prototypes.blend(z, alpha_t, method.activation, method.gain, method.scale)
            (slope,) = torch.autograd.grad(phi.sum(), z)
            assert slope.tolist() == pytest.approx([1.0 + alpha_t * (method.gain / 2 - 1)] * 3)


def test_a_kept_activation_is_not_annealed(settings):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    afa.inject(model, ["0"], r=2)
    prototypes.use_prototype(model, prototypes.PROTOTYPES["relu_kept"])
    afa.AnnealSchedule(1).attach(model).step()
    assert model[0].alpha_t == 1.0


def test_a_prototype_without_gain_and_scale_is_the_package(settings):
    task = sft_tasks.make(settings)
    models = []
    for change in (False, True):
        model = task.model(0)
        torch.manual_seed(0)
        adaptation.adapt(model, adaptation.METHODS["afa_silu"], adaptation.Adapter(2, 4.0), None)
        for module in model.modules():
            if isinstance(module, afa.AFALinear):
                torch.nn.init.normal_(module.lora_b, std=0.1)
        if change:
            prototypes.use_prototype(model, prototypes.Prototype("same", "adapters", "silu"))
        afa.AnnealSchedule(10).attach(model).step()
        models.append(model)
    torch.testing.assert_close(task.logits(models[0]), task.logits(models[1]), rtol=1e-4, atol=1e-4)


def test_the_share_beyond_a_linear_map():
    z = torch.tensor([[-1.0], [1.0]])
    # relu is (0, 1), the best multiple of z is z / 2: (1/2, 1/2) is left of a vector of length 1.
    assert prototypes.share_of_nonlinearity(z, "relu") == pytest.approx(math.sqrt(0.5))
    assert prototypes.share_of_nonlinearity(z.abs(), "relu") == pytest.approx(0.0, abs=1e-9)
    small = prototypes.share_of_nonlinearity(0.01 * z, "silu")
    assert 0 < small < 0.01 < prototypes.share_of_nonlinearity(z, "silu")


def test_the_studies_run_and_compare_seed_by_seed(config_file, settings, capsys):
    options = ["--config", str(config_file), "--seeds", "2", "--quiet"]
    assert annealing.main(["blends", "inputs", *options]) == 0
    result = json.loads((Path(settings.output) / "annealing.json").read_text())
    rows = {row["label"]: row for row in result["studies"]["blends"]}
    silu, lora = rows["silu"], rows["LoRA"]
    assert silu["differences"] == [a - b for a, b in zip(silu["scores"], lora["scores"], strict=True)]
    assert rows["silu, slope 1 at 0"]["against"] == "silu"
    measured = result["studies"]["inputs"]
    assert {row["alpha_t"] for row in measured} >= {0.0, 1.0}
    assert all(row["size"] > 0 and 0 <= row["share"] <= 1 for row in measured)
    assert (Path(settings.output) / "annealing.png").read_bytes().startswith(b"\x89PNG")
    assert "| silu, slope 1 at 0 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", annealing.STUDIES)
def test_a_study_compares_each_variant_with_one_of_its_own(name, settings):
    variants = annealing.STUDIES[name](settings)
    assert len({v.label for v in variants}) == len(variants)
    cells = {v.label: v.cell(settings, seed=0) for v in variants}
    assert {v.against for v in variants if v.against} <= set(cells)
    for variant in variants:
        if name == "ends" and variant.against:
            assert cells[variant.label].settings.decay_from_frac == cells[variant.against].settings.decay_from_frac
        if name == "ranks" and variant.against:
            assert cells[variant.label].settings.r == cells[variant.against].settings.r
