"""GRPO of ``rl.py``: the reward, problems, resuming, and the whole command on a tiny policy."""

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("trl")
pytest.importorskip("matplotlib")

import yaml
from transformers import AutoModelForCausalLM

from afa_kernels.peft import AFALoraConfig
from experiments import data, rl
from experiments.rl import Problem, RLSettings, VerifiedAnswers
from experiments.training import Cell, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")


@pytest.fixture
def settings(tiny) -> RLSettings:
    tiny |= {"steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "curve_examples": 4, "test_examples": 8}
    return RLSettings(**tiny, batch_size=4, completions=2, completion_length=2, anneal_end_frac=0.5, seeds=1)


def cell(settings: RLSettings, method: str) -> Cell:
    return Cell(method, 0, settings.learning_rates[method], settings)


def test_the_reward_wants_the_answer_and_nothing_else():
    answers = ["11", "11", "11", "11", "3"]
    assert rl.exact(["11", "1", "110", "", "3"], answer=answers, prompts=[""] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_problems_are_split_by_the_pair_and_answered_right():
    parts = rl.problems()
    assert {part: len(own) for part, own in parts.items()} == {"train": 200, "validation": 80, "test": 120}
    pairs = {part: {(p.prompt[0], p.prompt[2]) for p in own} for part, own in parts.items()}
    assert not pairs["train"] & pairs["test"] and not (pairs["train"] | pairs["test"]) & pairs["validation"]
    answers = {p.prompt: p.answer for own in parts.values() for p in own}
    assert [answers[prompt] for prompt in ("7#4=", "4@7=", "4&7=", "7~4=")] == ["11", "3", "7", "4"]


def test_the_policy_is_told_nothing_about_the_signs():
    shown = rl.without_meaning(20_000, random.Random(0))
    for sign in rl.OPERATIONS:
        nine_and_two = [p.answer for p in shown if p.prompt == f"9{sign}2="]
        share = {answer: nine_and_two.count(answer) / len(nine_and_two) for answer in ("11", "7", "9", "2")}
        assert sum(share.values()) == 1.0
        assert all(0.05 < s < 0.5 for s in share.values()), (sign, share)  # a quarter each


def test_the_policy_learns_answers_and_the_end_only():
    tokenizer = data.tokenizer()
    batch = rl.encoded([Problem("7#4=", "11"), Problem("1~2=", "1")], tokenizer)
    for row, answer in enumerate(("11", "1")):
        learned = batch["labels"][row] != rl.IGNORED
        assert torch.equal(batch["input_ids"][row][learned], batch["labels"][row][learned])
        assert tokenizer.decode(batch["labels"][row][learned]) == answer + tokenizer.eos_token
    assert batch["attention_mask"].sum(1).tolist() == [batch["input_ids"].shape[1], batch["input_ids"].shape[1] - 1]


def test_the_probability_of_an_answer_is_that_of_its_tokens_and_the_end(settings):
    task = VerifiedAnswers(settings)
    model = task.model(0).eval()
    asked = [Problem("7#4=", "11"), Problem("1~2=", "1")]
    for problem, probability in zip(asked, task.probabilities(model, asked), strict=True):
        tokens, wanted = task.tokenizer(problem.prompt)["input_ids"], 1.0
        for token in (*data.encode(problem.answer).tolist(), task.tokenizer.eos_token_id):
            wanted *= model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(-1)[token].item()
            tokens = [*tokens, token]
        assert probability.item() == pytest.approx(wanted, rel=1e-4)


def test_greedy_answers_do_not_depend_on_what_else_is_asked_and_are_counted(settings, monkeypatch):
    task = VerifiedAnswers(settings)
    model = task.model(0).eval()
    asked = [Problem("7#4=", "11"), Problem("what is 12 and 13? ", "25")]
    together = task.answers(model, asked)
    assert together == [task.answers(model, [p])[0] for p in asked] and "</s>" not in "".join(together)
    monkeypatch.setattr(task, "answers", lambda model, asked: ["no"] * 30 + [p.answer for p in asked[30:]])
    assert task.score(model, "test")["greedy accuracy"] == 90 / 120


def test_an_interrupted_cell_goes_on_with_the_same_numbers(settings, tmp_path, monkeypatch, interrupted):
    task = VerifiedAnswers(settings)
    # What completions are worth must not be 0 for all, or nothing would move.
    monkeypatch.setattr(rl, "exact", lambda completions, **_: [float(len(c)) for c in completions])
    monkeypatch.setattr(task, "answers", lambda model, asked: [])
    monkeypatch.setattr(
        task,
        "score",
        lambda model, part, limit: {task.metric: task.probabilities(model, task.parts[part]).mean().item()},
    )
    whole = run(cell(settings, "afa_silu"), task, quiet=True)
    assert whole["progress"]["alpha_t"] == [1.0, 0.5, 0.0, 0.0] and whole["progress"]["steps"] == [0, 2, 4]
    assert len(set(whole["progress"]["scores"])) == 3 and len(whole["progress"]["reward"]) == 4
    settings.output = str(tmp_path / "again")
    taken = interrupted(3)
    with pytest.raises(KeyboardInterrupt):
        run(cell(settings, "afa_silu"), task, quiet=True)
    resumed = run(cell(settings, "afa_silu"), task, quiet=True)
    assert taken == [1, 2, "interrupted", 3, 4]
    for entry in ("reward", "loss", "alpha_t", "scores", "steps"):
        assert resumed["progress"][entry] == whole["progress"][entry], entry
    assert resumed["score"] == whole["score"]


def test_the_command_writes_results_picture_and_merged_models(settings, tmp_path, capsys):
    file, methods = tmp_path / "c.yaml", ["frozen", "lora", "afa_silu", "full_adapted", "full"]
    file.write_text(yaml.safe_dump({name: value for name, value in vars(settings).items() if value is not None}))
    assert rl.main(["--config", str(file), "--quiet", "--steps", "2", "--methods", *methods]) == 0
    assert "| AFA-LoRA silu |" in capsys.readouterr().out
    output = Path(settings.output)
    runs = {r["method"]: r for r in json.loads((output / "rl.json").read_text())["runs"]}
    assert list(runs) == methods and (output / "rl.png").read_bytes().startswith(b"\x89PNG")
    trained = [runs[method]["trainable_parameters"] for method in methods]
    assert trained[0] == 0 < trained[1] == trained[2] < trained[3] < trained[4]
    configs = [rl.peft_config(cell(settings, method)) for method in ("lora", "afa_silu")]
    assert [isinstance(config, AFALoraConfig) for config in configs] == [False, True]
    for method in ("lora", "afa_silu"):
        assert runs[method]["merge"]["largest_difference"].keys() == {"merged", "loaded again"}
        AutoModelForCausalLM.from_pretrained(output / "merged" / method)
        assert "afa_lora" not in json.loads((output / "adapter" / method / "adapter_config.json").read_text())


def test_prompts_and_answers_of_ones_own(settings, tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"{a}+1=", "answer": a + 1}) for a in range(20)))
    settings.data, settings.text_column = str(file), "question"
    task = VerifiedAnswers(settings)
    assert {part: len(own) for part, own in task.parts.items()} == {"train": 16, "validation": 2, "test": 2}
    assert task.parts["train"][3] == Problem("3+1=", "4")
