"""The byte-level Llama of the experiments, its text, its pretraining; the task of hidden words."""

import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from experiments import pretrain
from experiments.harness import bytelm, keywords


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
