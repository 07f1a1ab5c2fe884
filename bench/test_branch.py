"""The branch alone, into a given base: forward and backward, and decoding."""

import pytest

from bench.problem import Problem
from bench.pytest_cases import NAMES, ROUNDS, WARMUP_ROUNDS, case, provider_or_skip
from bench.runner import build


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layer,m,r", [("minilm.up", 512, 8), ("plain.square", 1024, 16)])
def test_training(benchmark, name, dtype, layer, m, r):
    wanted = case("branch", layer, m, r, dtype)
    runner = build(provider_or_skip(name, wanted), Problem.of(wanted))
    benchmark.pedantic(
        lambda base: runner.backward(runner.forward(base)),
        setup=lambda: ((runner.prepare(),), {}),
        rounds=ROUNDS,
        warmup_rounds=WARMUP_ROUNDS,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [1, 16])
def test_decoding(benchmark, name, m):
    wanted = case("branch", "plain.square", m, 16, "f32")
    runner = build(provider_or_skip(name, wanted), Problem.of(wanted))
    base = runner.prepare()
    benchmark(runner.inference, base)
