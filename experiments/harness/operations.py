"""The task of ``rl.py``: what does an operation sign mean? The model knows the operations, the reward knows the signs.

A prompt is ``7#4=``, the answer the result of the operation that the sign stands for. The warm-up shows prompts with
the results of random operations: the model learns to write results, and nothing about the signs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "#": lambda a, b: a + b,
    "@": lambda a, b: abs(a - b),
    "&": max,
    "~": min,
}
DIGITS = range(10)
IGNORED = -100  # label of a token that has no loss
# Of the pairs of numbers; each sign is asked with every pair.
HELD_OUT = {"validation": 0.2, "test": 0.3}


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


def problems(seed: int = 0) -> dict[str, list[Problem]]:
    """Return the problems of ``train``, ``validation`` and ``test``, split by the pair of numbers."""
    pairs = [(a, b) for a in DIGITS for b in DIGITS]
    random.Random(seed).shuffle(pairs)
    result = {}
    for part, share in HELD_OUT.items():
        count = round(share * len(DIGITS) ** 2)
        result[part], pairs = _asked(pairs[:count]), pairs[count:]
    return {"train": _asked(pairs), **result}


def _asked(pairs: list[tuple[int, int]]) -> list[Problem]:
    return [Problem(f"{a}{sign}{b}=", str(operation(a, b))) for a, b in pairs for sign, operation in OPERATIONS.items()]


def without_meaning(count: int, generator: random.Random) -> list[Problem]:
    """Return random prompts, all pairs among them, with the results of random operations."""
    signs, operations = list(OPERATIONS), list(OPERATIONS.values())
    result = []
    for _ in range(count):
        a, b = generator.choice(DIGITS), generator.choice(DIGITS)
        result.append(Problem(f"{a}{generator.choice(signs)}{b}=", str(generator.choice(operations)(a, b))))
    return result


def encoded(problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, attention mask and labels, ``(problems, longest)`` each: the answer and an end are labelled."""
    tokens, labels = [], []
    for problem in problems:
        prompt = tokenizer(problem.prompt)["input_ids"]
        answer = [*tokenizer(problem.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        tokens.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer))

    def pad(values: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)

    return pad(tokens, 0), pad([torch.ones_like(row) for row in tokens], 0), pad(labels, IGNORED)
