"""A labelled task from the standard library: which word of a function is hidden?

A sentence encoder's mean vector says what a text is about, hardly which word is missing, so a frozen encoder does badly
here and fine-tuning has something to learn.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence

from examples.demo import data

LABELS = (
    "False",
    "None",
    "True",
    "and",
    "as",
    "def",
    "else",
    "for",
    "from",
    "if",
    "in",
    "is",
    "isinstance",
    "len",
    "not",
    "or",
    "raise",
    "return",
    "try",
    "with",
)
LEFT_OUT = {"test", "site-packages", "pydoc_data", "idlelib", "lib2to3", "turtledemo", "__phello__"}
LARGEST_SHARE = 2.0  # of a label, over an equal share
HIDDEN = "[MASK]"
_WORD = re.compile(r"\w+")


def modules() -> list[str]:
    """Return the names of the modules and packages of the standard library."""
    root = data.standard_library()
    names = {p.stem for p in root.glob("*.py")} | {p.parent.name for p in root.glob("*/__init__.py")}
    return sorted(names - LEFT_OUT)


def load(hidden: str = HIDDEN, seed: int = 0) -> data.Splits:
    """Return functions with one word of ``LABELS`` replaced by ``hidden``, and that word as the label.

    Whole definitions are held out, as in :func:`data.load`. Each function occurs once.
    """
    splits = data.load(modules(), seed=seed)
    parts = {name: hide(getattr(splits, name), hidden, seed) for name in ("train", "validation", "test")}
    return data.Splits(LABELS, **parts, near_duplicates=splits.near_duplicates)


def hide(examples: Sequence[data.Example], hidden: str, seed: int) -> list[data.Example]:
    """Return each example that has a word of ``LABELS`` after its first, with one of them hidden.

    The rarest word so far is taken, and frequent ones are dropped beyond ``LARGEST_SHARE``: no label is much more
    likely than another.
    """
    generator = random.Random(seed)
    counts: dict[str, int] = defaultdict(int)
    made = []
    for example in examples:
        found = [m for m in _WORD.finditer(example.text) if m[0] in LABELS and m.start() > 0]
        if not found:
            continue
        rarest = min(counts[m[0]] for m in found)
        chosen = generator.choice([m for m in found if counts[m[0]] == rarest])
        if rarest >= LARGEST_SHARE * (len(made) + len(LABELS)) / len(LABELS):
            continue
        counts[chosen[0]] += 1
        text = example.text[: chosen.start()] + hidden + example.text[chosen.end() :]
        made.append(data.Example(text, chosen[0], example.group))
    return made
