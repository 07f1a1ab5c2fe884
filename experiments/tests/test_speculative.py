"""Speculative decoding of ``speculative.py``: counts against cases made by hand, the proof of equality, resuming."""

import copy
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from experiments import sft
from experiments import speculative as command
from experiments.harness import bytelm, sft_config, sft_training, speculative
from experiments.harness.drafting import Drafting, DraftSettings
from experiments.harness.speculative import Decoded, OutputMismatch

ROOT = Path(__file__).resolve().parents[2]
RATES = {"lora": 1e-2, "afa_silu": 1e-2, "full_adapted": 1e-3, "full": 1e-3}
NEW = 12
PROMPTS = torch.arange(3 * 8).view(3, 8) + 40


def byte_model(seed: int, layers: int = 1):
    """Return a byte-level Llama with weights large enough that its choices are clear."""
    model = bytelm.new_model(32, layers, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    speculative.prepare_for_greedy(model)
    return model.eval()


@pytest.fixture(scope="module")
def target():
    return byte_model(seed=0, layers=2)


@pytest.fixture(scope="module")
def own_texts(target):
    return torch.cat([speculative.greedy(target, prompt[None], NEW) for prompt in PROMPTS])


class AlwaysWrong(torch.nn.Module):
    """Makes the head of a model choose the least likely token."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return -self.head(hidden)


def always_wrong(target):
    draft = copy.deepcopy(target)
    draft.lm_head = AlwaysWrong(draft.lm_head)
    return draft


# Counting


@pytest.mark.parametrize(
    ("agrees", "draft_tokens", "calls"),
    [
        ([True] * 12, 5, 2),  # 5 + 1, 5 + 1
        ([True] * 13, 5, 3),  # 5 + 1, 5 + 1, 1
        ([True] * 12, 1, 6),
        ([False] * 12, 5, 12),
        ([True, True, False, True, True, True], 5, 2),  # 2 + 1, then 2 + 1
        ([True, False, True, False], 3, 2),
        ([False], 5, 1),
        ([True], 5, 1),
    ],
)
def test_calls_of_cases_made_by_hand(agrees, draft_tokens, calls):
    assert speculative.target_calls(agrees, draft_tokens) == calls


def test_acceptance_is_what_the_calls_keep_beside_their_own_token():
    decoded = Decoded(prompts=2, new_tokens=24, target_calls=6)
    assert decoded.tokens_per_target_call == 4.0 and decoded.accepted_per_call == 3.0


def test_a_draft_that_is_the_target_has_everything_accepted(target, own_texts):
    decoded = speculative.decode(target, copy.deepcopy(target), PROMPTS, own_texts, draft_tokens=5)
    assert decoded == Decoded(prompts=3, new_tokens=3 * NEW, target_calls=3 * 2)
    assert decoded.accepted_per_call == 5.0


def test_a_draft_that_is_always_wrong_has_nothing_accepted(target, own_texts):
    decoded = speculative.decode(target, always_wrong(target), PROMPTS, own_texts, draft_tokens=5)
    assert decoded == Decoded(prompts=3, new_tokens=3 * NEW, target_calls=3 * NEW)
    assert decoded.accepted_per_call == 0.0


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
def test_one_forward_of_the_draft_tells_the_calls_of_real_decoding(target, own_texts, draft_tokens):
    draft = copy.deepcopy(target)
    with torch.no_grad():  # near the target: right at times
        for parameter in draft.model.layers[1].parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    real = speculative.decode(target, draft, PROMPTS, own_texts, draft_tokens)
    assert real == speculative.expected_decoding(draft, PROMPTS, own_texts, draft_tokens)
    agrees = speculative.agreement(draft, PROMPTS, own_texts)
    assert agrees.any() and not agrees.all()  # the case tests something


def test_calls_are_counted_only_inside(target):
    with speculative.counted_calls(target) as count:
        target(input_ids=PROMPTS)
        target(input_ids=PROMPTS)
    target(input_ids=PROMPTS)
    assert count == [2]


# Equality


def test_another_text_is_found(target, own_texts):
    other = own_texts.clone()
    other[1, 7] = (other[1, 7] + 1) % bytelm.VOCABULARY
    with pytest.raises(OutputMismatch, match="prompt 1: .* from new token 7 on"):
        speculative.decode(target, copy.deepcopy(target), PROMPTS, other, draft_tokens=5)


def test_a_shorter_text_is_found():
    with pytest.raises(OutputMismatch, match="from new token 3 on .of 5; 3 came."):
        speculative.check_equal(torch.arange(3), torch.arange(5), prompt=0)


# The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory, target) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("target", target), ("draft", byte_model(seed=1))):
        model.save_pretrained(folder / name)
        bytelm.tokenizer().save_pretrained(folder / name)
    return {"model": str(folder / "target"), "draft": str(folder / "draft")}


@pytest.fixture
def settings(folders, tmp_path) -> DraftSettings:
    text = tmp_path / "license.txt"
    text.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    entries = {
        **folders,
        "data": str(text),
        "steps": 6,
        "batch_size": 4,
        "length": 20,
        "prompt_length": 8,
        "train_prompts": 8,
        "validation_prompts": 4,
        "test_examples": 3,
        "evaluate_every": 3,
        "checkpoint_every": 2,
        "seeds": 1,
        "learning_rates": RATES,
        "output": str(tmp_path / "out"),
    }
    return sft_config.make(entries, DraftSettings)


@pytest.fixture(autouse=True)
def _a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def config_file(settings: DraftSettings, folder: Path) -> Path:
    file = folder / "c.yaml"
    file.write_text(json.dumps({name: value for name, value in settings.as_dict().items() if value is not None}))
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draft_tokens: 0", "draft_tokens: expected at least 1, got 0"),
        ("prompt_length: 128", "prompt_length: expected less than length=128, got 128"),
        ("train_prompts: few", "train_prompts: expected a whole number, got 'few'"),
        ("task: classification", "task: expected lm"),
        ("completions: 8", "completions: unknown setting"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit, match=f"speculative.py: {message}"):
        command.main(["--config", str(file)])


def test_the_published_settings_are_valid_and_every_method_is_tuned_alike():
    settings = sft_config.read(ROOT / "experiments" / "configs" / "speculative.yaml", DraftSettings)
    assert set(settings.grids) == set(settings.methods) - {"frozen"}
    assert len({len(grid) for grid in settings.grids.values()}) == 1
    for method, rate in settings.learning_rates.items():
        assert rate in settings.grids[method]


def test_a_draft_with_another_vocabulary_is_refused(settings, tmp_path):
    config = bytelm.config(32, 1)
    config.vocab_size = 32
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    bytelm.tokenizer().save_pretrained(tmp_path / "other")
    entries = settings.as_dict() | {"draft": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="draft: expected the target's vocabulary of 259 tokens, got one of 32"):
        Drafting(sft_config.make({k: v for k, v in entries.items() if v is not None}, DraftSettings))


def test_the_draft_learns_the_targets_text_and_not_the_prompt(settings):
    task = Drafting(settings)
    batch = task.batch(8, seed=0, step=0)
    assert sorted(map(tuple, batch[:, :8].tolist())) == sorted(map(tuple, task.prompts["train"].tolist()))
    for row in batch:
        text = speculative.greedy(task.target, row[None, :8], 12)[0]
        assert torch.equal(text, row[8:])
    model = task.model(0)
    changed = batch.clone()
    changed[:, 8:] = batch[:, 8:].roll(1, dims=0)
    assert not torch.isclose(task.loss(model, batch), task.loss(model, changed))
    logits = model(input_ids=batch).logits[:, 7:-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 8:].flatten())
    torch.testing.assert_close(task.loss(model, batch), wanted)


def test_the_test_score_is_that_of_real_decoding_of_the_merged_draft(settings, monkeypatch):
    task, accelerator = Drafting(settings), Accelerator(cpu=True)
    seen = []
    real = speculative.decode

    def spy(target, draft, *arguments):
        seen.append({type(m).__name__ for m in draft.modules()})
        return real(target, draft, *arguments)

    monkeypatch.setattr(speculative, "decode", spy)
    cell = sft_training.Cell("afa_silu", 0, 1e-2, settings)
    result = sft_training.run(cell, task, accelerator, quiet=True)
    assert len(seen) == 1 and "AFALinear" not in seen[0]
    assert result["score"]["prompts with the target's own text"] == 3
    assert result["score"]["tokens per target call"] == 3 * 12 / result["score"]["target calls"]


def test_the_command_writes_results_and_does_not_run_finished_cells_again(settings, tmp_path, monkeypatch, capsys):
    file = config_file(settings, tmp_path)
    methods = ["frozen", "afa_silu", "full_adapted"]
    options = ["--config", str(file), "--quiet", "--methods", *methods]
    assert command.main(options) == 0
    output = Path(settings.output)
    result = json.loads((output / "speculative.json").read_text())
    assert [r["method"] for r in result["runs"]] == methods
    assert (output / "speculative.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(output / "merged" / "afa_silu")
    first = capsys.readouterr().out
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sft_training.Run, "train", None)  # nothing may train
    monkeypatch.setattr(speculative, "greedy", None)  # nor the target continue anything
    assert command.main(options) == 0
    assert capsys.readouterr().out == first


def test_another_text_than_the_targets_fails_the_command(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Drafting, "_continue_test_prompts", lambda self: {"test": torch.full((3, 12), 40)}, raising=True
    )
    options = ["--config", str(config_file(settings, tmp_path)), "--quiet", "--methods", "frozen"]
    assert command.main(options) == 1
    assert "speculative decoding differs from the target alone" in capsys.readouterr().err


def test_the_best_rate_is_the_highest_where_higher_is_better():
    rows = [{"method": "lora", "learning_rate": rate, "m": score} for rate, score in ((1.0, 2.0), (2.0, 3.0))]
    assert sft.best_rates(rows, "m", higher_is_better=True) == {"lora": 2.0}
    assert sft.best_rates(rows, "m") == {"lora": 1.0}


def test_texts_are_equal_though_the_draft_trains_in_bfloat16(settings, tmp_path):
    options = ["--config", str(config_file(settings, tmp_path)), "--quiet", "--bf16", "--steps", "2", "--methods"]
    assert command.main([*options, "afa_silu", "full_adapted"]) == 0
