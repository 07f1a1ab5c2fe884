"""Some of the cases as benchmarks of pytest-benchmark, which compares runs: ``make bench-pytest``."""

import pytest

from bench.problem import Problem
from bench.providers import providers
from bench.runner import Runner, build
from bench.shapes import LAYERS, TRANSFORMERS, Case
from bench.transformer import Operands, Step

BRANCHES = ("eager", "afa.torch", "afa")
PROVIDERS = ("frozen", *BRANCHES)
ROUNDS = {"rounds": 15, "warmup_rounds": 2}
MODEL = TRANSFORMERS["tiny-transformer"]._replace(blocks=2)


@pytest.fixture(autouse=True)
def _a_table_for_each_case(benchmark, request):
    """In which the providers stand below each other."""
    case = [str(value) for key, value in request.node.callspec.params.items() if key != "name"]
    benchmark.group = " ".join([request.node.originalname.removeprefix("test_"), *case])


def runner_of(name: str, scope: str, layer: str, m: int, r: int, dtype: str = "f32", alpha_t: float = 0.5) -> Runner:
    _, k, n, bias = LAYERS[layer]
    case = Case(scope, layer, m, k, n, r, bias, dtype, dtype, alpha_t, "silu", 0.0, "cpu")
    return build(providers()[name], Problem.of(case))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layer, m, r", [("minilm.up", 512, 8), ("plain.square", 1024, 16)])
@pytest.mark.parametrize("name", BRANCHES)
def test_branch(benchmark, name, layer, m, r, dtype):
    """Forward and backward of the branch alone, onto a given base."""
    runner = runner_of(name, "branch", layer, m, r, dtype)
    base = runner.prepare()
    benchmark.pedantic(lambda: runner.backward(runner.forward(base)), **ROUNDS)


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("name", BRANCHES)
def test_decoding(benchmark, name, m):
    """Forward of the branch alone, without autograd."""
    runner = runner_of(name, "branch", "plain.square", m, 16)
    benchmark(runner.inference, runner.prepare())


@pytest.mark.parametrize("alpha_t", [0.5, 0.0])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_layer(benchmark, name, dtype, alpha_t):
    """Forward and backward of the frozen layer with its branch, annealing and at identity."""
    runner = runner_of(name, "layer", "minilm.up", 512, 8, dtype, alpha_t)
    benchmark.pedantic(lambda: runner.backward(runner.forward(None)), **ROUNDS)


@pytest.mark.parametrize("name", PROVIDERS)
def test_step(benchmark, name):
    """Forward and backward of a small transformer with an adapter in every linear layer."""
    sizes = MODEL.hidden, MODEL.intermediate
    case = Case("model", MODEL.name, 256, *sizes, 8, False, "f32", "f32", 0.5, "silu", 0.0, "cpu")
    benchmark.pedantic(Step(providers()[name], case, Operands.of(MODEL, case)), rounds=5, warmup_rounds=1)
