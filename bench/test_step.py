"""Forward and backward of the tiny transformer."""

import pytest

from bench.pytest_cases import NAMES, case, provider_or_skip
from bench.shapes import TRANSFORMERS
from bench.transformer import Operands, Step

_MODEL = TRANSFORMERS["tiny-transformer"]._replace(blocks=2)


@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, name):
    wanted = case("layer", "minilm.up", 256, 8, "f32")
    wanted = wanted._replace(scope="model", layer=_MODEL.name, k=_MODEL.hidden, n=_MODEL.intermediate, bias=False)
    step = Step(provider_or_skip(name, wanted), wanted, Operands.of(_MODEL, wanted))
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
