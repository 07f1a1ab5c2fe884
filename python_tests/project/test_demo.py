"""The parts of the demo: splits without leaks, the methods, and the whole command on a tiny model."""

import json
import sys
from pathlib import Path
from textwrap import indent

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import afa_kernels as afa
from examples.demo import __main__ as demo
from examples.demo import checks, data, tuning
from examples.demo.classifier import Classifier, Encoded
from examples.demo.methods import METHODS, Adapter, annealing, prepare
from examples.demo.training import Recipe, accuracy, train

RECIPE = Recipe(steps=20, batch_size=8, evaluate_every=10, curve_examples=16)


@pytest.fixture(scope="module")
def splits() -> data.Splits:
    return data.load()


@pytest.fixture(scope="module")
def tiny_model(splits, tmp_path_factory) -> Path:
    """A BERT of 2 layers with random weights and one token per word of the training texts."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("tiny-bert")
    splitter = tokenizers.pre_tokenizers.Whitespace()
    words = {word for e in splits.train[:500] for word, _ in splitter.pre_tokenize_str(e.text)}
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *sorted(words)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = splitter
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoded(splits, tiny_model) -> dict[str, Encoded]:
    return {
        name: Encoded(getattr(splits, name)[:200], splits.labels, tiny_model)
        for name in ("train", "validation", "test")
    }


def write_modules(root: Path, **sources: str) -> None:
    for name, source in sources.items():
        (root / f"{name}.py").write_text(source, encoding="utf-8")


def function(name: str, word: str) -> str:
    return f"def {name}(self):\n" + "".join(f"    {word}_{i} = {word} + {i}\n" for i in range(8))


def test_no_definition_and_no_text_is_in_two_splits(splits):
    parts = (splits.train, splits.validation, splits.test)
    for key in (lambda e: e.group, lambda e: e.text.lower()):
        train_keys, validation_keys, test_keys = ({key(e) for e in part} for part in parts)
        assert not train_keys & validation_keys
        assert not (train_keys | validation_keys) & test_keys


def test_held_out_texts_overlap_little_with_every_other(splits):
    seen = [data.shingles(e.text) for e in splits.train]
    for example in splits.test[:40]:
        own = data.shingles(example.text)
        assert max(len(own & other) for other in seen) < len(own) / 2, example.text


def test_every_module_is_trained_and_tested(splits):
    assert set(splits.labels) == {e.label for e in splits.train}
    assert set(splits.labels) == {e.label for e in splits.test}


def test_splits_are_the_same_in_every_run(splits):
    assert data.load() == splits


def test_another_seed_holds_out_others(splits):
    one, two = (data.split_by_group(splits.train, seed)["test"] for seed in (0, 1))
    assert one and {e.text for e in one} != {e.text for e in two}


def test_near_duplicates_are_dropped_and_others_kept():
    def example(text: str) -> data.Example:
        return data.Example(data.shown(text), "a", ("a.py", text))

    trained = example(function("first", "alpha"))
    copy = example(function("second", "alpha"))
    other = example(function("first", "beta"))
    assert data.without_near_duplicates([copy, other], [trained]) == [other]


def test_a_text_of_two_modules_is_no_example(tmp_path):
    same = function("f", "same")
    write_modules(tmp_path, a=same + function("g", "only_a"), b=same + function("h", "only_b"))
    examples = data.without_duplicates(e for label in "ab" for e in data.functions(tmp_path, label))
    assert [e.group for e in examples] == [("a.py", "g"), ("b.py", "h")]


def test_a_class_stays_on_one_side(tmp_path):
    def source(word: str) -> str:
        def methods(c: int) -> str:
            return "".join(function(f"m{m}", f"{word}_{c}_{m}") for m in range(4))

        return "\n".join(f"class C{c}:\n{indent(methods(c), '    ')}" for c in range(12))

    write_modules(tmp_path, a=source("alpha"), b=source("beta"))
    examples = [e for label in "ab" for e in data.functions(tmp_path, label)]
    assert len(examples) == 2 * 12 * 4
    parts = data.split_by_group(examples, seed=0)
    groups = [{e.group for e in part} for part in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 24
    assert all(groups)


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match="root: expected sources of modules"):
        data.load(root=tmp_path)


def test_annealing_ends_when_the_learning_rate_starts_to_fall():
    recipe = Recipe(steps=100, batch_size=1, evaluate_every=1, curve_examples=1)
    schedule = annealing(recipe)
    factors = [recipe.learning_rate_factor(step) for step in range(recipe.steps)]
    full_rate = [step for step, factor in enumerate(factors) if factor == 1.0]
    assert full_rate == list(range(full_rate[0], full_rate[-1] + 1))
    assert 0 < factors[0] < 1 and 0 < factors[-1] < 0.05
    assert schedule(0) == 1.0 and schedule(full_rate[-1]) == 0.0


def mean_loss(model: Classifier, examples: Encoded) -> float:
    batch = examples.batch(range(len(examples)))
    return nn.functional.cross_entropy(checks.logits_of(model, [batch]), batch.labels).item()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_and_trains_what_it_says(name, splits, encoded, tiny_model):
    ready = prepare(name, tiny_model, len(splits.labels), RECIPE, Adapter(r=2), 3e-3)
    layers = [m for m in ready.model.modules() if isinstance(m, afa.AFALinear)]
    loss_before = mean_loss(ready.model, encoded["train"])
    before = {key: value.clone() for key, value in ready.model.state_dict().items()}
    curve = train(
        ready.model, ready.groups, encoded["train"], encoded["validation"], RECIPE,
        schedule=ready.schedule, name=name, quiet=True,
    )  # fmt: skip
    changed = {key for key, value in ready.model.state_dict().items() if not torch.equal(value, before[key])} - {
        f"{n}.alpha_t_buffer" for n, _ in ready.model.named_modules()
    }
    trained = {key for key, p in ready.model.named_parameters() if p.requires_grad}
    assert changed <= trained
    assert {"head.weight", "head.bias"} <= changed
    assert mean_loss(ready.model, encoded["train"]) < loss_before
    assert curve.steps == [0, 10, 20] and len(curve.alpha_t) == 20
    if name == "head":
        assert trained == {"head.weight", "head.bias"} and not layers
    elif name == "full":
        assert not layers and all(p.requires_grad for p in ready.model.parameters())
    else:
        assert len(layers) == 12
        assert all("lora_" in key or key.startswith("head.") for key in trained)
    if name == "afa":
        assert curve.alpha_t[0] == 1.0 and curve.alpha_t[12:] == [0.0] * 8
        assert all(layer.alpha_t == 0.0 for layer in layers)
    else:
        assert not any(curve.alpha_t)


def test_all_methods_start_alike_and_see_the_same_batches(splits, encoded, tiny_model):
    models = [prepare(name, tiny_model, len(splits.labels), RECIPE, Adapter(r=2)).model for name in METHODS]
    batch = encoded["test"].batch(range(8))
    first, *others = [checks.logits_of(model, [batch]) for model in models]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)
    passes = [list(encoded["train"].training_batches(30, 8, seed=3)) for _ in range(2)]
    for one, two in zip(*passes, strict=True):
        assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.labels, two.labels)


def test_no_example_repeats_before_all_were_used(encoded):
    batches = list(encoded["train"].training_batches(25, 8, seed=0))  # 200 examples: one pass
    drawn = sorted(label for batch in batches for label in batch.labels.tolist())
    assert drawn == sorted(encoded["train"].batch(range(200)).labels.tolist())


def test_accuracy_counts_right_answers(splits, encoded, tiny_model):
    torch.manual_seed(0)
    model = Classifier(tiny_model, len(splits.labels))
    batches = list(encoded["test"].evaluation_batches(limit=50))
    predicted = torch.cat([checks.logits_of(model, [b]).argmax(1) for b in batches])
    labels = torch.cat([b.labels for b in batches])
    assert 0 < accuracy(model, batches) == pytest.approx((predicted == labels).float().mean().item())
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[3] = 1.0
    assert accuracy(model, batches) == pytest.approx((labels == 3).float().mean().item())


def test_tuning_picks_the_best_validation_accuracy():
    fields = ("method", "learning_rate", "validation_accuracy", "final_loss")
    runs = [("a", 1.0, 0.5, 2.0), ("a", 2.0, 0.6, 9.0), ("b", 3.0, 0.4, 2.0), ("b", 4.0, 0.4, 1.0)]
    assert tuning.best_rates([dict(zip(fields, run, strict=True)) for run in runs]) == {"a": 2.0, "b": 4.0}


@pytest.fixture
def command(monkeypatch, splits, tiny_model, tmp_path):
    def run(*options: str) -> int:
        monkeypatch.setattr(data, "load", lambda: splits)  # reading the standard library takes seconds
        monkeypatch.setattr(demo, "QUICK", RECIPE)
        monkeypatch.setattr(demo, "QUICK_TEST_EXAMPLES", 64)
        fixed = ("demo.py", "--quick", "--model", str(tiny_model), "--output", str(tmp_path))
        monkeypatch.setattr(sys, "argv", [*fixed, *options])
        return demo.main()

    return run


def test_the_command_writes_results_picture_and_adapter(command, tmp_path, capsys):
    assert command() == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "demo.json").read_text())
    assert {"python", "torch", "cpu", "threads", "backends"} <= result["environment"].keys()
    assert [r["method"] for r in result["runs"]] == list(METHODS)
    for r in result["runs"]:
        assert 0.0 <= r["test_accuracy"] <= 1.0 and r["train_seconds"] > 0
        assert len(r["curve"]["loss"]) == len(r["curve"]["alpha_t"]) == RECIPE.steps
        assert f"{r['trainable_parameters']:,}" in printed
    assert result["identity_step"] == 12
    assert "exactly 0 at step 12 of 20" in printed
    assert "path fused" in printed and "path gemm" in printed
    assert result["merge"]["runs_the_plain_layers"] and result["merge"]["layers_left"] == 0
    assert result["merge"]["afa_operators_merged"] == 0
    # Of each of the two layers: query, key and value together, and three others.
    assert result["merge"]["afa_operators_unmerged"] == 8
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(result["peft"]["files"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_merge_that_changes_the_function_fails_the_command(command, monkeypatch, capsys):
    merge = afa.merge

    def wrong(model):
        merge(model)
        with torch.no_grad():
            model.head.bias[0] += 0.1

    monkeypatch.setattr(afa, "merge", wrong)
    assert command() == 1
    assert "checks FAILED" in capsys.readouterr().out


def test_several_seeds_give_several_runs(command, tmp_path, capsys):
    assert command("--seeds", "2") == 0
    result = json.loads((tmp_path / "demo.json").read_text())
    assert [r["seed"] for r in result["runs"]] == [0] * 4 + [1] * 4
    assert "seeds: 2" in capsys.readouterr().out
