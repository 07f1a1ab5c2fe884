"""GRPO of ``rl.py``: rewards, problems, settings, resuming, and the whole command on a tiny policy."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from afa_kernels.peft import AFALoraConfig
from experiments import rl, warm_up
from experiments.harness import bytelm, operations, rewards, rl_training, sft_config
from experiments.harness.rl_task import RLSettings, VerifiedAnswers
from experiments.harness.sft_training import Cell, MergeMismatch

ROOT = Path(__file__).resolve().parents[2]
RATES = {"lora": 1e-2, "afa_silu": 1e-2, "full_adapted": 1e-3, "full": 1e-3}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A byte-level Llama of one layer with random weights."""
    folder = tmp_path_factory.mktemp("policy")
    bytelm.new_model(32, 1, seed=0).save_pretrained(folder)
    bytelm.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(policy, tmp_path) -> RLSettings:
    entries = {
        "model": str(policy),
        "steps": 4,
        "batch_size": 4,
        "completions": 2,
        "completion_length": 2,
        "evaluate_every": 2,
        "curve_examples": 4,
        "test_examples": 8,
        "checkpoint_every": 2,
        "anneal_end_frac": 0.5,
        "seeds": 1,
        "learning_rates": RATES,
        "output": str(tmp_path / "out"),
    }
    return sft_config.make(entries, RLSettings)


@pytest.fixture(autouse=True)
def _a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def cell(settings: RLSettings, method: str) -> Cell:
    return Cell(method, 0, RATES[method], settings)


# Rewards and problems


def test_the_exact_reward_wants_the_answer_and_nothing_else():
    answers = ["11", "11", "11", "11", "3"]
    assert rewards.exact(["11", "1", "110", "", "3"], answer=answers, prompts=[""] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_reward_by_characters_counts_places():
    answers = ["11", "11", "11", "12", ""]
    assert rewards.characters(["11", "1", "110", "21", ""], answer=answers) == [1.0, 0.5, 2 / 3, 0.0, 0.0]


def test_rewards_refuse_other_numbers_of_answers():
    for reward in rewards.REWARDS.values():
        with pytest.raises(ValueError):
            reward(["1", "2"], answer=["1"])


def test_problems_are_split_by_the_pair_and_answered_right():
    parts = operations.problems()
    assert {part: len(own) for part, own in parts.items()} == {"train": 200, "validation": 80, "test": 120}
    pairs = {part: {(p.prompt[0], p.prompt[2]) for p in own} for part, own in parts.items()}
    assert not pairs["train"] & pairs["test"] and not (pairs["train"] | pairs["test"]) & pairs["validation"]
    by_hand = {"7#4=": "11", "4@7=": "3", "4&7=": "7", "7~4=": "4"}
    answers = {p.prompt: p.answer for own in parts.values() for p in own}
    assert {prompt: answers[prompt] for prompt in by_hand} == by_hand


def test_the_warm_up_says_nothing_about_the_signs():
    shown = operations.without_meaning(20_000, random.Random(0))
    for sign in operations.OPERATIONS:
        nine_and_two = [p.answer for p in shown if p.prompt == f"9{sign}2="]
        share = {answer: nine_and_two.count(answer) / len(nine_and_two) for answer in ("11", "7", "9", "2")}
        assert sum(share.values()) == 1.0
        assert all(0.05 < s < 0.5 for s in share.values()), (sign, share)  # a quarter each


def test_the_warm_up_learns_answers_and_the_end_only():
    problems = [operations.Problem("7#4=", "11"), operations.Problem("1~2=", "1")]
    tokenizer = bytelm.tokenizer()
    tokens, mask, labels = operations.encoded(problems, tokenizer)
    assert tokenizer.decode(labels[0][labels[0] >= 0], skip_special_tokens=True) == "11"
    for row in range(2):
        learned = labels[row] >= 0
        assert torch.equal(tokens[row][learned], labels[row][learned])
        assert labels[row][learned][-1] == tokenizer.eos_token_id
    assert mask[1].sum() == len(tokens[1]) - 1 and labels[1][-1] == operations.IGNORED


# Settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("completions: 1", "completions: expected at least 2"),
        ("batch_size: 12", "batch_size: expected a multiple of completions=8, got 12"),
        ("reward: fast", "reward: expected one of exact, characters, got 'fast'"),
        ("temperature: 0", "temperature: expected a positive number, got 0.0"),
        ("beta: -1", "beta: expected 0 or more, got -1.0"),
        ("completion_length: 0", "completion_length: expected at least 1"),
        ("task: classification", "task: expected lm"),
        ("draft: x", "draft: unknown setting"),
        ("steps: many", "steps: expected a whole number, got 'many'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        sft_config.read(file, RLSettings)
    with pytest.raises(SystemExit, match=f"rl.py: {message}"):
        rl.main(["--config", str(file)])


def test_the_published_settings_are_valid_and_every_method_is_tuned_alike():
    settings = sft_config.read(ROOT / "experiments" / "configs" / "rl.yaml", RLSettings)
    assert set(settings.grids) == set(settings.methods) - {"frozen"}
    assert len({len(grid) for grid in settings.grids.values()}) == 1
    for method, rate in settings.learning_rates.items():
        assert rate in settings.grids[method]


# Cells


def test_the_score_counts_right_greedy_answers(settings, policy, monkeypatch):
    task = VerifiedAnswers(settings)
    right = [p.answer for p in task.parts["test"]]
    monkeypatch.setattr(task, "answers", lambda model, problems: ["no"] * 30 + right[30:])
    score = task.score(AutoModelForCausalLM.from_pretrained(policy), "test")
    assert score["greedy accuracy"] == 90 / 120


def test_the_probability_of_an_answer_is_that_of_its_tokens_and_the_end(settings, policy):
    task = VerifiedAnswers(settings)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    problems = [operations.Problem("7#4=", "11"), operations.Problem("1~2=", "1")]
    end = task.tokenizer.eos_token_id
    for problem, probability in zip(problems, task.probabilities(model, problems), strict=True):
        tokens, wanted = task.tokenizer(problem.prompt)["input_ids"], 1.0
        for token in (*problem.answer.encode(), end - bytelm.OFFSET):
            likely = model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(-1)
            wanted *= likely[token + bytelm.OFFSET].item()
            tokens = [*tokens, token + bytelm.OFFSET]
        assert probability.item() == pytest.approx(wanted, rel=1e-4)


def test_answers_do_not_depend_on_what_else_is_asked(settings, policy):
    task = VerifiedAnswers(settings)
    model = AutoModelForCausalLM.from_pretrained(policy)
    problems = [operations.Problem("7#4=", "11"), operations.Problem("what is 12 and 13? ", "25")]
    together = task.answers(model, problems)
    assert together == [task.answers(model, [p])[0] for p in problems]
    assert "</s>" not in "".join(together)


def test_lora_is_pefts_own_and_afa_lora_has_the_activation(settings):
    lora, annealed = (rl_training.peft_config(cell(settings, method)) for method in ("lora", "afa_silu"))
    assert not isinstance(lora, AFALoraConfig)
    assert isinstance(annealed, AFALoraConfig) and annealed.activation == "silu"
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (annealed.r, annealed.lora_alpha, annealed.target_modules)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_interrupted_cell_goes_on_and_a_finished_one_is_not_run_again(settings, monkeypatch):
    task, accelerator = VerifiedAnswers(settings), Accelerator(cpu=True)
    # What completions are worth must not be 0 for all, or nothing would move.
    monkeypatch.setitem(rewards.REWARDS, "exact", lambda completions, **_: [float(len(c)) for c in completions])
    unbroken = dataclasses.replace(settings, output=settings.output + "-unbroken")
    whole = rl_training.run(cell(unbroken, "afa_silu"), task, accelerator, quiet=True)
    assert whole["progress"]["alpha_t"] == [1.0, 0.5, 0.0, 0.0]
    assert whole["progress"]["steps"] == [0, 2, 4] and len(whole["progress"]["reward"]) == 4

    note = rl_training.ScoreCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        note(self, args, state, control, **kwargs)

    monkeypatch.setattr(rl_training.ScoreCallback, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        rl_training.run(cell(settings, "afa_silu"), task, accelerator, quiet=True)
    monkeypatch.setattr(rl_training.ScoreCallback, "on_step_end", note)
    resumed = rl_training.run(cell(settings, "afa_silu"), task, accelerator, quiet=True)
    for entry in ("reward", "loss", "alpha_t", "scores", "steps"):
        assert resumed["progress"][entry] == whole["progress"][entry], entry
    assert resumed["score"] == whole["score"]
    file = cell(settings, "afa_silu").file(task)
    assert not file.with_suffix("").exists()  # the checkpoints

    monkeypatch.setattr(rl_training, "train", None)  # nothing may train
    again = rl_training.run(cell(settings, "afa_silu"), task, accelerator, quiet=True)
    assert again == json.loads(file.read_text()) == json.loads(json.dumps(resumed))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")
def test_the_command_writes_results_picture_and_merged_models(settings, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    sft_entries = {k: v for k, v in settings.as_dict().items() if v is not None}
    config.write_text(json.dumps(sft_entries))
    methods = ["frozen", "lora", "afa_silu", "full_adapted", "full"]
    assert rl.main(["--config", str(config), "--quiet", "--steps", "2", "--methods", *methods]) == 0
    printed = capsys.readouterr().out
    output = Path(settings.output)
    result = json.loads((output / "rl.json").read_text())
    assert [r["method"] for r in result["runs"]] == methods
    by_method = {r["method"]: r for r in result["runs"]}
    trained = {m: r["trainable_parameters"] for m, r in by_method.items()}
    assert trained["frozen"] == 0 < trained["lora"] == trained["afa_silu"] < trained["full_adapted"] < trained["full"]
    assert "probability of the right answer" in printed and "AFA-LoRA silu" in printed
    assert (output / "rl.png").read_bytes().startswith(b"\x89PNG")
    for method in ("lora", "afa_silu"):
        assert by_method[method]["merge"]["largest_difference"].keys() == {"merged", "loaded again"}
        AutoModelForCausalLM.from_pretrained(output / "merged" / method)
        assert "afa_lora" not in json.loads((output / "adapter" / method / "adapter_config.json").read_text())


def test_a_merge_that_changes_the_function_is_found(settings, policy):
    import peft

    task = VerifiedAnswers(settings)
    model = peft.get_peft_model(task.model(0), rl_training.peft_config(cell(settings, "lora")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    unload = model.merge_and_unload

    def wrong():
        merged = unload()
        with torch.no_grad():
            merged.lm_head.weight[5] += 0.1
        return merged

    model.merge_and_unload = wrong
    with pytest.raises(MergeMismatch, match="off by"):
        rl_training.merge_check(model, task, "lora", None, Accelerator(cpu=True))


def test_the_warm_up_makes_a_policy_once(policy, tmp_path, capsys, monkeypatch):
    options = ["operations", "--model", str(policy), "--steps", "3", "--batch-size", "2", "--output", str(tmp_path)]
    assert warm_up.main(options) == 0
    first = capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == bytelm.VOCABULARY
    monkeypatch.setattr(warm_up, "train", None)  # nothing may train
    assert warm_up.main(options) == 0
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit, match="was made with"):
        warm_up.main([*options, "--seed", "1"])


def test_own_prompts_and_answers(settings, tmp_path):
    file = tmp_path / "sums.jsonl"
    rows = [{"question": f"{a}+1=", "answer": a + 1} for a in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = VerifiedAnswers(dataclasses.replace(settings, data=str(file), text_column="question"))
    assert {part: len(own) for part, own in task.parts.items()} == {"train": 16, "validation": 2, "test": 2}
    assert task.parts["train"][3] == operations.Problem("3+1=", "4")
    with pytest.raises(ValueError, match="data: expected a column 'prompt'"):
        VerifiedAnswers(dataclasses.replace(settings, data=str(file)))
