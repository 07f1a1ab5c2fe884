"""Speculative decoding measured: how many tokens a call of the target gives with a draft model.

The draft proposes some tokens, one call of the target checks them all, keeps those that it would have chosen itself and
adds one of its own. Greedy decoding is meant throughout, so the text is the target's own, whatever the draft proposes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class OutputMismatch(RuntimeError):
    """Speculative decoding gave another text than the target alone."""


@dataclass(frozen=True)
class Decoded:
    """What speculative decoding of some prompts took."""

    prompts: int
    new_tokens: int
    target_calls: int

    @property
    def tokens_per_target_call(self) -> float:
        return self.new_tokens / self.target_calls

    @property
    def accepted_per_call(self) -> float:
        """Mean acceptance length: draft tokens that a call keeps, without the target's own one."""
        return (self.new_tokens - self.target_calls) / self.target_calls


def prepare_for_greedy(model: nn.Module) -> None:
    """Make ``generate`` of ``model`` plain greedy decoding of a fixed number of tokens: an end of text does not stop
    it, and nothing that its files say about sampling applies."""
    from transformers import GenerationConfig

    padding = model.generation_config.pad_token_id
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0 if padding is None else padding)


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """Return the continuations ``(prompts, new_tokens)`` of ``prompts`` ``(prompts, length)`` by ``model`` alone."""
    model.eval()
    prompts = prompts.to(next(model.parameters()).device)
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new_tokens)
    return out[:, prompts.shape[1] :].cpu()


@torch.no_grad()
def decode(
    target: nn.Module, draft: nn.Module, prompts: Tensor, expected: Sequence[Tensor], draft_tokens: int
) -> Decoded:
    """Decode each prompt with ``generate(assistant_model=draft)``, compare the text with the expected one, and count
    the calls of ``target``.

    Args:
        prompts: ``(prompts, length)``.
        expected: the target's own greedy continuation of each prompt.
        draft_tokens: how many tokens the draft proposes for a call.

    Raises:
        OutputMismatch: a text differs from the expected one.
    """
    target.eval()
    draft.eval()
    settings = draft.generation_config
    settings.num_assistant_tokens = draft_tokens
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0  # no early end of a proposal
    device = next(target.parameters()).device
    calls = new_tokens = 0
    for number, (prompt, own) in enumerate(zip(prompts, expected, strict=True)):
        tokens = prompt.unsqueeze(0).to(device)
        with counted_calls(target) as count:
            out = target.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                assistant_model=draft,
                do_sample=False,
                max_new_tokens=len(own),
            )
        check_equal(out[0, len(prompt) :].cpu(), own, number)
        calls += count[0]
        new_tokens += len(own)
    return Decoded(len(prompts), new_tokens, calls)


def check_equal(got: Tensor, own: Tensor, prompt: int) -> None:
    """Raise OutputMismatch unless ``got`` is the target's own continuation of prompt number ``prompt``."""
    if torch.equal(got, own):
        return
    shared = min(len(got), len(own))
    differing = (got[:shared] != own[:shared]).nonzero()
    where = differing[0].item() if len(differing) else shared
    raise OutputMismatch(
        f"prompt {prompt}: speculative decoding differs from the target alone from new token {where} on "
        f"(of {len(own)}; {len(got)} came)"
    )


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


@torch.no_grad()
def agreement(draft: nn.Module, prompts: Tensor, continuations: Tensor) -> Tensor:
    """Return where ``draft`` would choose the target's token, given the target's text so far, ``(prompts, new)``."""
    draft.eval()
    tokens = torch.cat([prompts, continuations], dim=1).to(next(draft.parameters()).device)
    chosen = draft(input_ids=tokens, use_cache=False).logits[:, prompts.shape[1] - 1 : -1].argmax(-1)
    return chosen.cpu() == continuations


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


def expected_decoding(draft: nn.Module, prompts: Tensor, continuations: Tensor, draft_tokens: int) -> Decoded:
    """Return what :func:`decode` would take, from one forward of the draft: no text is generated."""
    rows = torch.cat(
        [agreement(draft, p, c) for p, c in zip(prompts.split(64), continuations.split(64), strict=True)]
    ).tolist()
    calls = sum(target_calls(row, draft_tokens) for row in rows)
    return Decoded(len(prompts), continuations.numel(), calls)
