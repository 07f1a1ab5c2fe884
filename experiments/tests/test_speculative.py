"""Speculative decoding of ``speculative.py``: counts against cases made by hand, the proof of equality, the command."""

import copy
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("trl")
pytest.importorskip("matplotlib")

import yaml
from transformers import AutoModelForCausalLM

from experiments import data, pretrain, speculative
from experiments.speculative import Drafting, DraftSettings, score_of
from experiments.training import Cell, Mismatch, run

NEW = 12
PROMPTS = torch.arange(3 * 8).view(3, 8) + 40


def byte_model(seed: int, layers: int = 1):
    """Return a byte-level Llama with weights large enough that its choices are clear."""
    model = pretrain.new_model(32, layers, seed)
    model.lm_head.weight.data.mul_(8)
    return speculative.plain_greedy(model)


@pytest.fixture(scope="module")
def target():
    return byte_model(seed=0, layers=2)


@pytest.fixture(scope="module")
def own_texts(target):
    return torch.cat([speculative.greedy(target, prompt[None], NEW) for prompt in PROMPTS])


@pytest.mark.parametrize(
    ("agrees", "draft_tokens", "calls"),
    [
        ([True] * 12, 5, 2),  # 5 + 1, 5 + 1
        ([True] * 13, 5, 3),  # 5 + 1, 5 + 1, 1
        ([False] * 12, 5, 12),
        ([True, True, False, True, True, True], 5, 2),  # 2 + 1, then 2 + 1
        ([True, False, True, False], 3, 2),
        ([True], 5, 1),
    ],
)
def test_calls_of_cases_made_by_hand(agrees, draft_tokens, calls):
    assert speculative.target_calls(agrees, draft_tokens) == calls


def test_everything_is_accepted_of_the_target_itself_and_nothing_of_a_draft_that_is_always_wrong(target, own_texts):
    draft = copy.deepcopy(target)
    assert speculative.decode(target, draft, PROMPTS, own_texts, draft_tokens=5) == score_of(3, 3 * NEW, 3 * 2)
    draft.lm_head.weight.data.neg_()  # it chooses the least likely token
    assert speculative.decode(target, draft, PROMPTS, own_texts, draft_tokens=5) == score_of(3, 3 * NEW, 3 * NEW)


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
def test_one_forward_of_the_draft_tells_the_calls_of_real_decoding(target, own_texts, draft_tokens):
    draft = copy.deepcopy(target)
    for parameter in draft.model.layers[1].parameters():  # near the target: right at times
        parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    real = speculative.decode(target, draft, PROMPTS, own_texts, draft_tokens)
    assert real == speculative.expected_decoding(draft, PROMPTS, own_texts, draft_tokens)
    assert 3 * 2 < real["target calls"] < 3 * NEW  # the case tests something


def test_another_text_is_found(target, own_texts):
    other = own_texts.clone()
    other[1, 7] = (other[1, 7] + 1) % data.VOCABULARY
    with pytest.raises(Mismatch, match="prompt 1: speculative decoding differs from the target alone"):
        speculative.decode(target, copy.deepcopy(target), PROMPTS, other, draft_tokens=5)


@pytest.fixture
def settings(tiny, target, text_file, tmp_path) -> DraftSettings:
    for name, model in (("target", target), ("draft", byte_model(seed=1))):
        model.save_pretrained(tmp_path / name)
        data.tokenizer().save_pretrained(tmp_path / name)
    tiny |= {"model": str(tmp_path / "target"), "steps": 6, "evaluate_every": 3, "test_examples": 3}
    sizes = {"length": 20, "prompt_length": 8, "train_prompts": 8, "validation_prompts": 4, "batch_size": 4}
    return DraftSettings(**tiny, **sizes, draft=str(tmp_path / "draft"), data=text_file, seeds=1)


def test_the_draft_learns_the_targets_text_and_not_the_prompt(settings):
    task = Drafting(settings)
    rows = torch.cat([task.batch(4, seed=0, step=step)["input_ids"] for step in range(2)])
    assert sorted(map(tuple, rows[:, :8].tolist())) == sorted(map(tuple, task.prompts["train"].tolist()))
    for row in rows:
        assert torch.equal(speculative.greedy(task.target, row[None, :8], 12)[0], row[8:])
    model = task.model(0)
    logits = model(input_ids=rows).logits[:, 7:-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 8:].flatten())
    torch.testing.assert_close(task.loss(model, {"input_ids": rows}), wanted)


def test_the_test_score_is_that_of_real_decoding_of_the_merged_draft(settings, monkeypatch):
    task, seen, real = Drafting(settings), [], speculative.decode

    def spy(target, draft, *arguments):
        seen.append({type(m).__name__ for m in draft.modules()})
        return real(target, draft, *arguments)

    monkeypatch.setattr(speculative, "decode", spy)
    score = run(Cell("afa_silu", 0, 1e-2, settings), task, quiet=True)["score"]
    assert len(seen) == 1 and "AFALinear" not in seen[0]
    assert score["prompts with the target's own text"] == 3
    assert score["tokens per target call"] == 3 * 12 / score["target calls"]


def test_the_command_writes_results_goes_on_after_an_interruption_and_runs_nothing_twice(
    settings, tmp_path, monkeypatch, capsys, interrupted
):
    file, methods = tmp_path / "c.yaml", ["frozen", "afa_silu", "full_adapted"]
    file.write_text(yaml.safe_dump({name: value for name, value in vars(settings).items() if value is not None}))
    options = ["--config", str(file), "--quiet", "--methods", *methods]
    taken = interrupted(5)
    with pytest.raises(KeyboardInterrupt):
        speculative.main(options)
    assert speculative.main(options) == 0
    assert taken == [1, 2, 3, 4, "interrupted", 4, 5, 6, 1, 2, 3, 4, 5, 6]
    output = Path(settings.output)
    assert [r["method"] for r in json.loads((output / "speculative.json").read_text())["runs"]] == methods
    assert (output / "speculative.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(output / "merged" / "afa_silu")
    first = capsys.readouterr().out
    monkeypatch.setattr(Drafting, "train", None)  # nothing may train
    assert speculative.main(options) == 0
    assert capsys.readouterr().out == first


def test_another_text_than_the_targets_fails_the_command(settings, tmp_path, monkeypatch, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in vars(settings).items() if value is not None}))
    monkeypatch.setattr(speculative, "greedy", lambda model, prompts, new: torch.full((len(prompts), new), 40))
    assert speculative.main(["--config", str(file), "--quiet", "--methods", "frozen"]) == 1
    assert "speculative decoding differs from the target alone" in capsys.readouterr().err
