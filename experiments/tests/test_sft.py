"""The comparison of fine-tunings and the studies of annealing: what trains, resuming, files, the check of the merge."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

pytest.importorskip("scipy")
pytest.importorskip("trl")
pytest.importorskip("matplotlib")

import afa_kernels as afa
from experiments import annealing, data, pretrain, sft
from experiments.settings import METHODS
from experiments.sft import SFTSettings
from experiments.tests.conftest import ROOT
from experiments.training import Cell, run


@pytest.fixture
def settings(tiny, text_file) -> SFTSettings:
    return SFTSettings(**tiny, data=text_file, batch_size=2, length=16, seeds=2)


@pytest.fixture
def config_file(settings, tmp_path) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in vars(settings).items() if value is not None}))
    return str(file)


def cell(settings: SFTSettings, method: str, seed: int = 0) -> Cell:
    return Cell(method, seed, settings.learning_rates.get(method, 0.0), settings)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_says_and_nothing_else_changes(name, settings):
    task = sft.make_task(settings)
    settings.learning_rates.setdefault(name, 1e-2)
    before = task.model(0).state_dict()
    trained, log = task.train(cell(settings, name), Path(settings.output), quiet=True)
    changes = {key for key, p in trained.named_parameters() if p.requires_grad}
    after = {key.replace("base_layer.", ""): value for key, value in trained.state_dict().items()}
    assert {key for key in before if not torch.equal(after[key], before[key])} == changes & set(before)
    linear = {key for key, module in task.model(0).named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    alpha_t = [entry["alpha_t"] for entry in log if "alpha_t" in entry and "loss" in entry]
    if name == "frozen":
        assert not changes
    elif name == "full":
        assert changes == set(before)
    elif name == "full_adapted":
        assert changes == {f"{layer}.weight" for layer in linear}
    else:
        assert changes == {f"{layer}.lora_{side}" for layer in linear for side in "ab"}
        assert all(m.alpha_t == 0.0 for m in trained.modules() if isinstance(m, afa.AFALinear))
        assert alpha_t == ([] if name == "lora" else pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize("method", ["afa_silu", "full"])
def test_an_interrupted_cell_goes_on_bit_by_bit_and_a_finished_one_is_not_run_again(
    method, settings, tmp_path, interrupted
):
    task = sft.make_task(settings)
    whole = run(cell(settings, method), task, quiet=True)
    settings.output = str(tmp_path / "again")
    taken = interrupted(7)
    with pytest.raises(KeyboardInterrupt):
        run(cell(settings, method), task, quiet=True)
    resumed = run(cell(settings, method), task, quiet=True)
    assert taken == [1, 2, 3, 4, 5, 6, "interrupted", 7, 8, 9, 10]
    assert resumed["score"] == whole["score"]
    for name in ("loss", "alpha_t", "steps", "scores"):
        assert resumed["progress"][name] == whole["progress"][name], name
    assert not list(Path(settings.output).rglob("checkpoint-*"))
    assert run(cell(settings, method), task, quiet=True) == json.loads(json.dumps(resumed)) and len(taken) == 11
    settings.r = 3
    assert run(cell(settings, method), task, quiet=True)["score"] != resumed["score"] or method == "full"
    assert len(taken) == 21


def test_the_command_writes_table_picture_adapter_and_a_merged_model(config_file, settings, capsys):
    methods = ("frozen", "lora", "afa_silu", "full_adapted", "full")
    assert sft.main(["--config", config_file, "--quiet", "--methods", *methods]) == 0
    printed, output = capsys.readouterr().out, Path(settings.output)
    result = json.loads((output / "sft.json").read_text())
    assert [(r["seed"], r["method"]) for r in result["runs"]] == [(seed, m) for seed in range(2) for m in methods]
    row = result["summary"]["nats per byte"]["afa_silu"]
    assert f"| AFA-LoRA silu | {row['mean']:.4f} ± {row['spread']:.4f} |" in printed
    assert (output / "sft.png").read_bytes().startswith(b"\x89PNG")
    one = next(r for r in result["runs"] if r["method"] == "afa_silu")
    assert set(one["merge"]["largest_difference"]) == {"merged", "loaded again"}
    assert (output / "adapter" / "afa_silu" / "adapter_model.safetensors").is_file()
    # The merged model, loaded by transformers alone, scores what the annealed model scored.
    merged = transformers.AutoModelForCausalLM.from_pretrained(output / "merged" / "afa_silu")
    score = sft.make_task(settings).score(merged, "test", 4)["nats per byte"]
    assert score == pytest.approx(one["score"]["nats per byte"], abs=1e-5)


def test_the_grid_is_run_on_a_seed_and_a_split_of_its_own(config_file, settings, monkeypatch):
    cells = []

    def score(cell, *_):
        cells.append((cell.method, cell.seed, cell.rate, cell.part))
        return {"score": {"nats per byte": cell.rate}}

    monkeypatch.setattr("experiments.comparison.run", score)
    flags = ["--tune", "--grids", '{"lora": [1e-2, 3e-2]}', "--methods", "lora", "full"]
    assert sft.main(["--config", config_file, *flags]) == 0
    assert cells == [("lora", 1000, rate, "validation") for rate in (1e-2, 3e-2)]
    assert json.loads((Path(settings.output) / "tune.json").read_text())["best"] == {"lora": 1e-2}


def test_what_is_missing_is_named(config_file, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="learning_rates: expected rates of full too"):
        sft.main(["--config", config_file, "--learning-rates", '{"lora": 1}', "--methods", "lora", "full"])
    with pytest.raises(SystemExit, match="data: expected a column 'body' in .*, got .'text'."):
        sft.main(["--config", config_file, "--text-column", "body"])
    with pytest.raises(SystemExit, match="data: expected at least 10000 tokens to train, got"):
        sft.main(["--config", config_file, "--length", "10000"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="outputs/source is missing: run python -m experiments.pretrain"):
        sft.main([])


def test_a_merge_that_changes_the_function_fails_the_command(config_file, settings, monkeypatch, capsys):
    merge = afa.merge

    def wrong(model):
        merge(model).get_submodule("model.layers.0.mlp.up_proj").base_layer.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(afa, "merge", wrong)
    assert sft.main(["--config", config_file, "--quiet", "--methods", "afa_silu"]) == 1
    assert "FAILED: afa_silu: the logits of the merged model are off by" in capsys.readouterr().err
    assert not list(Path(settings.output).rglob("result.json"))  # it does not count as finished


def test_classification_learns_rows_of_ones_own(settings, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=data.VOCABULARY, **sizes)).save_pretrained(tmp_path / "m")
    data.tokenizer().save_pretrained(tmp_path / "m")
    rows = [{"text": f"{'ab'[i % 2] * 4} {i}", "label": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings.task, settings.model, settings.data = "classification", str(tmp_path / "m"), str(tmp_path / "rows.jsonl")
    settings.keep_layers, settings.steps, settings.batch_size, settings.test_examples = 1, 40, 8, None
    task = sft.make_task(settings)
    result = run(cell(settings, "lora"), task, quiet=True, save_merged=True)
    assert result["score"]["accuracy"] == 1.0 and result["score"]["nats per label"] < 0.5
    assert set(result["merge"]["largest_difference"]) == {"merged", "loaded again"}
    epoch = [row for step in range(6) for row in task.batch(8, 0, step)["input_ids"].tolist()]
    assert len({tuple(token for token in row if token > 1) for row in epoch}) == 48  # all rows to train, each once


def test_a_hidden_word_is_gone_from_its_place():
    examples = [sft.Example(f"def f{i}(x): return x if x else {i}", "m", ("f", "f")) for i in range(40)]
    hidden = sft.hide(examples, "[MASK]", seed=0)
    assert len(hidden) == 9  # no label more than twice as often as an equal share
    for example in hidden:
        assert example.text.count("[MASK]") == 1 and example.text.startswith("def f")
        assert example.text.replace("[MASK]", example.label) in {e.text for e in examples}


def test_the_parts_of_the_topics_share_next_to_nothing():
    train, validation, test = (text.split("\n\n") for text in data.topic_texts().values())
    for held_out, others in ((validation, train), (test, train), (test, validation)):
        assert sum(len(p) for p in held_out if p in set(others)) < 0.04 * sum(map(len, held_out))


@pytest.mark.slow
def test_two_processes_learn_as_one_does(config_file, tmp_path):
    def command(*launcher: str, output: str) -> list[dict]:
        flags = (
            "--config",
            config_file,
            "--quiet",
            "--methods",
            "lora",
            "afa_silu",
            "--output",
            str(tmp_path / output),
        )
        subprocess.run([*launcher, "-m", "experiments.sft", *flags], cwd=ROOT, check=True)
        return json.loads((tmp_path / output / "sft.json").read_text())["runs"]

    one = command(sys.executable, output="one")
    two = command(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", output="two")
    for a, b in zip(one, two, strict=True):
        assert (a["processes"], b["processes"]) == (1, 2)
        assert b["score"]["nats per byte"] == pytest.approx(a["score"]["nats per byte"], rel=1e-3)


# Pretraining and annealing


def test_pretraining_makes_models_that_transformers_loads_and_keeps_them(tmp_path, monkeypatch, capsys):
    ids = data.encode("def f(x):\n    return x\n" * 200)
    monkeypatch.setattr(data, "standard_library_source", lambda: (ids, ids[:400]))
    monkeypatch.setattr(pretrain, "OUTPUTS", tmp_path)
    tiny = pretrain.Recipe("source", 30, 16, 3e-3, hidden=32, layers=1, length=32)
    further = [pretrain.Recipe(text, 2, 4, 1e-3, start="source") for text in ("english", "operations")]
    monkeypatch.setattr(pretrain, "MODELS", dict(zip(("source", "target", "policy"), (tiny, *further), strict=True)))
    with pytest.raises(SystemExit):
        pretrain.main(["policy"])  # there is nothing to begin with yet
    assert pretrain.main(["source", "target", "policy", "--quiet"]) == 0
    for name in ("source", "target", "policy"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert data.nats_per_token(model, ids[:400], 32) < 0.7 * math.log(data.VOCABULARY)
    monkeypatch.setattr(pretrain, "pretrain", None)  # nothing may train
    assert pretrain.main(["source", "policy"]) == 0


def test_a_prototype_without_gain_and_scale_is_the_package(settings):
    task, logits = sft.make_task(settings), []
    for method in (METHODS["afa_silu"], annealing.Prototype("same", "adapters", "silu")):
        model = task.model(0)
        torch.manual_seed(0)
        method.adapt(model, settings)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.1)
        afa.AnnealSchedule(10).attach(model).step()
        logits.append(task.logits(model))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_the_share_beyond_a_linear_map():
    z = torch.tensor([[-1.0], [1.0]])
    # relu is (0, 1), the best multiple of z is z / 2: (1/2, 1/2) is left of a vector of length 1.
    assert annealing.share_of_nonlinearity(z, "relu") == pytest.approx(math.sqrt(0.5))
    assert annealing.share_of_nonlinearity(z.abs(), "relu") == pytest.approx(0.0, abs=1e-9)


def test_the_studies_of_annealing_run_and_compare_seed_by_seed(config_file, settings, capsys):
    assert annealing.main(["kept", "inputs", "--config", config_file, "--seeds", "2", "--quiet"]) == 0
    studies = json.loads((Path(settings.output) / "annealing.json").read_text())["studies"]
    rows = {row["label"]: row for row in studies["kept"]}
    kept, lora = rows["silu, never annealed"], rows["LoRA"]
    assert kept["differences"] == [a - b for a, b in zip(kept["scores"], lora["scores"], strict=True)]
    assert kept["scores"] != rows["silu, annealed"]["scores"]
    assert {row["alpha_t"] for row in studies["inputs"]} >= {0.0, 1.0}
    assert all(row["size"] > 0 and 0 <= row["share"] <= 1 for row in studies["inputs"])
    assert "| silu, never annealed |" in capsys.readouterr().out
    assert not list(Path(settings.output).rglob("checkpoint-*"))
    assert annealing.main(["kept", "--config", config_file, "--seeds", "1", "--quiet"]) == 0
    one = rows["silu, annealed"]
    assert f"| LoRA | {one['differences'][0]:+.4f} |" in capsys.readouterr().out  # one seed has no interval


def test_a_study_compares_each_variant_with_one_of_its_own_and_is_drawn(settings, tmp_path):
    for name, variants in annealing.studies(settings).items():
        cells = {v.label: v.cell(settings, seed=0) for v in variants}
        assert len(cells) == len(variants)
        for variant in (v for v in variants if v.against):
            own, other = cells[variant.label].settings, cells[variant.against].settings
            assert own.decay_from_frac == other.decay_from_frac and own.r == other.r and own.steps == other.steps, name
    ends = annealing.studies(settings)["ends"]
    progress = {"loss": [1.0, 0.5], "alpha_t": [1.0, 0.0]}
    annealing.draw(ends, {variant.label: [{"progress": progress}] for variant in ends}, tmp_path / "annealing.png")
    assert (tmp_path / "annealing.png").read_bytes().startswith(b"\x89PNG")
