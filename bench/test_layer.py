"""The frozen layer with its branch: forward and backward, annealing and at identity."""

import pytest

from bench.problem import Problem
from bench.pytest_cases import NAMES, ROUNDS, WARMUP_ROUNDS, case, provider_or_skip
from bench.runner import build


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("alpha_t", [0.5, 0.0])
@pytest.mark.parametrize("layer,m,r", [("minilm.up", 512, 8)])
def test_training(benchmark, name, dtype, alpha_t, layer, m, r):
    wanted = case("layer", layer, m, r, dtype, alpha_t)
    runner = build(provider_or_skip(name, wanted), Problem.of(wanted))
    benchmark.pedantic(lambda: runner.backward(runner.forward(None)), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
