"""Train a draft model for speculative decoding by LoRA, AFA-LoRA and full fine-tuning, and decode with it.

    python -m experiments.pretrain draft source target
    python -m experiments.speculative --config experiments/configs/speculative.yaml
    python -m experiments.speculative --config experiments/configs/speculative.yaml --tune    choose the learning rates

The draft proposes some tokens, one call of the target checks them all, keeps those that it would have chosen itself and
adds one of its own. Decoding is greedy, so the text has to be the target's own whatever the draft proposes; else the
command ends with exit code 1. The draft, which knows the source of the standard library, learns to continue English
text as the target does; the loss is its cross-entropy on the target's tokens.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from experiments import data
from experiments.comparison import command
from experiments.settings import Settings, setting
from experiments.sft import LanguageModelling
from experiments.training import Mismatch, device, digest, merged, weights_digest

TARGET, DRAFT = Path("outputs/target"), Path("outputs/draft")
GENERATED_AT_ONCE = 64


@dataclass
class DraftSettings(Settings):
    """``model`` is the target."""

    draft: str | None = setting(None, "Hugging Face id or folder of the draft; default: a small byte model")
    prompt_length: int = setting(32, "tokens of a sample that are text; the target continues them to --length tokens")
    train_prompts: int = setting(1024, "prompts that the target continues to train on")
    validation_prompts: int = setting(128, "prompts to choose learning rates on")
    test_examples: int = setting(32, "prompts of the final score")
    draft_tokens: int = setting(5, "tokens that the draft proposes for each call of the target")
    output: str = setting("outputs/speculative", "folder of all results")

    def __post_init__(self):
        super().__post_init__()
        self.expect(
            "prompt_length", 1 <= self.prompt_length < self.length, f"1 or more, less than length={self.length}"
        )
        self.expect("draft_tokens", self.draft_tokens >= 1, "at least 1")


def score_of(prompts: int, new_tokens: int, target_calls: int) -> dict[str, float]:
    tokens = new_tokens / target_calls
    return {
        "tokens per target call": tokens,
        "accepted draft tokens per call": tokens - 1,
        "target calls": target_calls,
        "prompts with the target's own text": prompts,
    }


def plain_greedy(model: nn.Module) -> nn.Module:
    """Make ``generate`` of ``model`` greedy decoding of a fixed number of tokens: an end of text does not stop it, and
    nothing that its files say about sampling applies."""
    padding = model.generation_config.pad_token_id
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0 if padding is None else padding)
    return model.eval()


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """Return the continuations ``(prompts, new_tokens)`` of ``prompts`` ``(prompts, length)`` by ``model`` alone."""
    prompts = prompts.to(device(model))
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens)
    return out[:, prompts.shape[1] :].cpu()


@torch.no_grad()
def decode(target: nn.Module, draft: nn.Module, prompts: Tensor, expected: Tensor, draft_tokens: int) -> dict:
    """Decode each prompt with ``generate(assistant_model=draft)``, count the calls of ``target`` and return the score.

    Args:
        prompts, expected: ``(prompts, length)`` and the target's own greedy continuations, ``(prompts, new_tokens)``.
        draft_tokens: how many tokens the draft proposes for a call.

    Raises:
        Mismatch: a text differs from the expected one.
    """
    settings = draft.generation_config
    settings.num_assistant_tokens = draft_tokens
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0  # no early end of a proposal
    new_tokens = expected.shape[1]
    with counted_calls(target) as count:
        for number, (prompt, own) in enumerate(zip(prompts, expected, strict=True)):
            tokens = prompt.unsqueeze(0).to(device(target))
            out = target.generate(
                tokens, attention_mask=torch.ones_like(tokens), assistant_model=draft, max_new_tokens=new_tokens
            )
            if not torch.equal(out[0, len(prompt) :].cpu(), own):
                raise Mismatch(f"prompt {number}: speculative decoding differs from the target alone")
    return score_of(len(prompts), expected.numel(), count[0])


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[list[int]]:
    """Count the forward calls of ``model`` in the one entry of a list."""
    count = [0]

    def add(*_):
        count[0] += 1

    hook = model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


def target_calls(agrees: Sequence[bool], draft_tokens: int) -> int:
    """Return how many calls of the target a text takes, from where the draft agrees with it.

    Each call keeps the proposed tokens up to the first that the target would not choose, and adds one; the last one of
    the text is always the target's, so nothing is proposed for it.
    """
    done = calls = 0
    while done < len(agrees):
        proposed = agrees[done : done + min(draft_tokens, len(agrees) - done - 1)]
        accepted = next((i for i, agreed in enumerate(proposed) if not agreed), len(proposed))
        done += accepted + 1
        calls += 1
    return calls


@torch.no_grad()
def expected_decoding(draft: nn.Module, prompts: Tensor, continuations: Tensor, draft_tokens: int) -> dict:
    """Return what :func:`decode` would, from the draft's forward on the target's texts: nothing is generated."""
    tokens = torch.cat([prompts, continuations], dim=1)
    logits = [draft(input_ids=rows.to(device(draft)), use_cache=False).logits for rows in tokens.split(64)]
    chosen = torch.cat([rows[:, prompts.shape[1] - 1 : -1].argmax(-1).cpu() for rows in logits])
    calls = sum(target_calls(row, draft_tokens) for row in (chosen == continuations).tolist())
    return score_of(len(prompts), continuations.numel(), calls)


class Drafting(LanguageModelling):
    """A score of the validation part comes from one forward of the draft, the test score from real speculative decoding
    of the merged draft."""

    higher_is_better = ("tokens per target call", "accepted draft tokens per call")

    def __init__(self, settings: DraftSettings):
        self.settings = settings
        target = settings.model or data.existing(TARGET)
        super().__init__(settings, settings.draft or data.existing(DRAFT))
        self.metric = "tokens per target call"  # not the loss of the language model
        # In bfloat16, rounding chooses another of two like tokens at times when several are checked in one call.
        self.target = plain_greedy(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32))
        sizes = [m.config.get_text_config().vocab_size for m in (self.target, self.model(0))]
        if sizes[0] != sizes[1]:
            raise ValueError(f"draft: expected the target's vocabulary of {sizes[0]} tokens, got one of {sizes[1]}")
        if torch.cuda.is_available():
            self.target.to("cuda")
        counts = (settings.train_prompts, settings.validation_prompts, settings.test_examples)
        self.prompts = {part: self._prompts(part, count) for part, count in zip(data.PARTS, counts, strict=True)}
        self.continuations = {part: self._continue(part) for part in data.PARTS}
        self.weights = weights_digest(target)

    def _prompts(self, part: str, count: int) -> Tensor:
        ids, length = self.parts[part], self.settings.prompt_length
        starts = torch.linspace(0, len(ids) - length, count).round().long()
        return ids[starts.unsqueeze(1) + torch.arange(length)]

    def _continue(self, part: str) -> Tensor:
        # One at a time in the test, as in speculative decoding: in a batch, rounding may choose another of two like
        # tokens.
        pieces = self.prompts[part].split(1 if part == "test" else GENERATED_AT_ONCE)
        new = self.settings.length - self.settings.prompt_length
        return torch.cat([greedy(self.target, piece, new) for piece in pieces])

    def fingerprint(self) -> dict[str, str]:
        prompts = digest(*(self.prompts[part].numpy().tobytes() for part in data.PARTS))
        return super().fingerprint() | {"target": self.weights, "prompts": prompts}

    def batch(self, size: int, seed: int, step: int) -> dict[str, Tensor]:
        """Return prompts with their continuations, ``(size, length)``; none is repeated before all were used."""
        count, rows = len(self.prompts["train"]), []
        for place in range(step * size, (step + 1) * size):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + place // count)
            rows.append(torch.randperm(count, generator=generator)[place % count])
        chosen = torch.stack(rows)
        return {"input_ids": torch.cat([self.prompts["train"][chosen], self.continuations["train"][chosen]], dim=1)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return data.loss(model, batch["input_ids"], first=self.settings.prompt_length)

    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        texts, tokens = (self.prompts[part][:limit], self.continuations[part][:limit]), self.settings.draft_tokens
        if part == "test":
            draft = plain_greedy(merged(copy.deepcopy(model)).to(device(self.target)))
            return decode(self.target, draft, *texts, tokens)
        training = model.training
        decoded = expected_decoding(model.eval(), *texts, tokens)
        model.train(training)
        return decoded


def main(argv: list[str] | None = None) -> int:
    return command("speculative", argv, __doc__, DraftSettings, Drafting)


if __name__ == "__main__":
    sys.exit(main())
