"""Rewards that a program can verify, with the signature that TRL's trainers call."""

from collections.abc import Callable, Sequence


def exact(completions: Sequence[str], answer: Sequence[str], **_) -> list[float]:
    """Return 1 for a completion that is the answer and nothing else, else 0."""
    return [float(completion == wanted) for completion, wanted in zip(completions, answer, strict=True)]


def characters(completions: Sequence[str], answer: Sequence[str], **_) -> list[float]:
    """Return the share of characters that are those of the answer at the same place; too long or short costs."""
    return [
        sum(a == b for a, b in zip(completion, wanted, strict=False)) / max(len(completion), len(wanted), 1)
        for completion, wanted in zip(completions, answer, strict=True)
    ]


REWARDS: dict[str, Callable[..., list[float]]] = {"exact": exact, "characters": characters}
