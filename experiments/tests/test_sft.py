"""The comparison of fine-tunings: what trains, resume, its table and files, the check of the merge."""

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

from accelerate import Accelerator
from accelerate.state import AcceleratorState

import afa_kernels as afa
from experiments import sft
from experiments.harness import adaptation, bytelm, sft_config, sft_tasks, sft_training, statistics
from experiments.tests.sft_helpers import (
    RATES,
    ROOT,
    byte_bert,
    byte_llama,
    cell,
    license_text,
    rows_of_two_labels,
    tiny_settings,
    write_config,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return byte_llama(tmp_path_factory.mktemp("byte-llama"))


@pytest.fixture
def settings(model_folder, tmp_path) -> sft_config.Settings:
    return tiny_settings(model_folder, tmp_path)


@pytest.fixture
def config_file(settings, tmp_path) -> Path:
    return write_config(settings, tmp_path / "tiny.yaml")


@pytest.fixture(autouse=True)
def _a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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


def test_the_best_rate_is_that_of_the_lowest_score():
    rows = [
        {"method": "lora", "learning_rate": rate, "loss": loss}
        for rate, loss in ((1e-3, 2.0), (1e-2, 1.5), (1e-1, math.nan))
    ]
    assert sft.best_rates(rows, "loss") == {"lora": 1e-2}


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
        changes |= {"task": task, "model": str(byte_bert(tmp_path / "bert")), "data": str(rows_of_two_labels(tmp_path))}
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


def test_classification_of_rows_learns_them(settings, tmp_path):
    entries = {
        "task": "classification",
        "model": str(byte_bert(tmp_path / "bert")),
        "data": str(rows_of_two_labels(tmp_path)),
    }
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
    entries = {
        "task": "classification",
        "model": str(byte_bert(tmp_path / "bert")),
        "data": str(rows_of_two_labels(tmp_path)),
    }
    task = sft_tasks.make(dataclasses.replace(settings, **entries))
    epoch = [task.batch(6, 0, step).input_ids for step in range(8)]  # 48 examples to train
    again = task.batch(6, 0, 5).input_ids
    assert torch.equal(again, epoch[5]) and not torch.equal(epoch[0][:, :4], task.batch(6, 1, 0).input_ids[:, :4])
    assert len({tuple(row[row > 1].tolist()) for batch in epoch for row in batch}) == 48


@pytest.mark.slow
def test_two_processes_learn_as_one_does(config_file, settings, tmp_path):
    def command(*launcher: str, output: str) -> list[dict]:
        options = ("--config", config_file, "--quiet", "--methods", "lora", "afa_silu", "--output", tmp_path / output)
        subprocess.run([*launcher, "-m", "experiments.sft", *map(str, options)], cwd=ROOT, check=True)
        return json.loads((tmp_path / output / "sft.json").read_text())["runs"]

    one = command(sys.executable, output="one")
    two = command(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", output="two")
    for a, b in zip(one, two, strict=True):
        assert (a["processes"], b["processes"]) == (1, 2)
        assert b["score"]["nats per byte"] == pytest.approx(a["score"]["nats per byte"], rel=1e-3)


def test_without_the_pretrained_model_the_command_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run python -m experiments.pretrain first"):
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
