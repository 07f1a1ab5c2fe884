"""A training step of the tiny transformer."""

import pytest

from bench.pytest_cases import NAMES, case, provider_or_skip
from bench.transformer import HIDDEN, INTERMEDIATE, Step


@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, name):
    wanted = case("layer", "minilm.up", 256, 8, "f32")
    wanted = wanted._replace(scope="model", layer="tiny", k=HIDDEN, n=INTERMEDIATE, bias=False)
    step = Step(provider_or_skip(name, wanted), wanted, layers=2)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
