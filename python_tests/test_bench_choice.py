"""Which backend takes a call on compute capability 9.0 and 10.0 is what bench/model/choice.py makes of it."""

from collections import Counter

import pytest
import torch
from conftest import skip_unless_available

from afa_kernels.backend import cuda
from afa_kernels.backend.registry import Call
from bench.model.__main__ import LAYERS, RANKS, ROWS
from bench.model.cuda_launches import Layer

pytest.importorskip("triton")
from bench.model.choice import CARDS, cheapest, middle, prices
from bench.model.layer_overhead import torch_backend_costs
from tools.triton_aot import Problem

# How much more than on `triton` a call may cost that stays with `cuda`, which saves the host some launches; and how
# much more than on `torch`, whose price is flattered.
_MARGIN, _FLATTERED = 1.1, 1.3


@pytest.fixture(autouse=True)
def _planned():
    """Without CUDA kernels in the build, the emulator plans the launches."""
    skip_unless_available("cuda_emulated")


def left_to(layer: Layer) -> str:
    left = cuda._leaves(Call("cuda", torch.bfloat16, layer.m, layer.k, layer.n, layer.r, "silu"))
    return "cuda" if left is None else left[0]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.gpu.name)
@pytest.mark.parametrize("r", RANKS)
def test_the_choice_follows_the_model(card, r, monkeypatch):
    """All layers of the list together, for each number of rows: the choice does not depend on K and N."""
    major, minor = divmod(int(card.device.arch.removeprefix("sm_")), 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
    backends = set()
    for m in ROWS:
        layers = [Layer(m, k, n, r) for k, n in LAYERS]
        (chosen,) = {left_to(layer) for layer in layers}
        backends.add(chosen)
        total = Counter()
        for layer in layers:
            price = middle(prices(layer, card))
            total.update(price)
            assert m > 64 or cheapest(price) == chosen == "cuda", layer
        if r <= 64:
            assert cheapest(total) == chosen, (m, total)
        assert total[chosen] <= (_MARGIN if chosen == "cuda" else 1.0) * min(total["cuda"], total["triton"]), (m, total)
        assert total[chosen] <= _FLATTERED * total["torch"], (m, total)
    assert backends == ({"cuda", "triton"} if r > 64 else {"cuda"})


def test_products_cost_triton_less_and_launches_more():
    card = CARDS[0]
    wide, few = (prices(Layer(m, 4096, 4096, 128), card) for m in (32768, 1))
    for direction in (0, 1):
        assert wide["triton"][direction].bad < wide["cuda"][direction].bad
        assert few["triton"][direction].good > few["cuda"][direction].good
        assert all(few["torch"][direction].good > few[name][direction].good for name in ("cuda", "triton"))


def test_an_operand_as_large_as_the_weight_is_not_taken_for_it():
    square, other = (torch_backend_costs(Problem(m, 512, 512, 16)) for m in (512, 520))
    assert [[cost.name for cost in each] for each in square] == [[cost.name for cost in each] for each in other]
