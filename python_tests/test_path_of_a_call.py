"""CONTRIBUTING.md lists the hops of a call; here a call is traced and compared with the list."""

import re
import sys
from pathlib import Path

import pytest
import torch

import afa_kernels as afa

pytestmark = pytest.mark.fast

PACKAGE = Path(afa.__file__).parent
PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def listed(direction: str) -> tuple[list[tuple[str, str]], set[str]]:
    """Return the hops of a direction, (file, function), and the names of the helpers that its hops mention."""
    section = PAGE.read_text().partition("## The path of a call")[2].partition("\n## ")[0]
    forward, _, backward = section.partition("\nBackward")
    text = forward if direction == "forward" else backward.partition("\n`afa_lora`")[0]
    hops = re.findall(r"^\d+\. `(\w+\.py): (\w+)`", text, re.MULTILINE)
    return hops, set(re.findall(r"`(\w+)`", text))


def traced(call) -> list[tuple[str, str]]:
    """Return the functions of the package that ``call`` enters, in order."""
    entered = []

    def note(frame, event, _argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE) and frame.f_code.co_name != "<genexpr>":
            entered.append((file.name, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_hops_are_those_of_the_list(direction):
    if not afa.backends()["cpu"]:
        pytest.skip(afa.backends()["cpu"].reason)
    layer, x = afa.AFALinear(torch.nn.Linear(16, 12), r=4), torch.randn(3, 16, requires_grad=True)
    y = layer(x)
    dy = torch.ones_like(y)
    entered = traced(lambda: layer(x)) if direction == "forward" else traced(lambda: y.backward(dy))
    hops, helpers = listed(direction)
    assert len(hops) <= {"forward": 8, "backward": 4}[direction]
    assert [each for each in entered if each in hops] == hops
    assert {each[1] for each in entered if each not in hops} <= helpers
