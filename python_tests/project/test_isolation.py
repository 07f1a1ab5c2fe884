"""What a caller's environment holds reaches no test, and what a run chooses does; nor does a fault of torch on some
processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance.layouts import placed
from conformance.problems import KINDS
from conformance.problems import Problem as RandomProblem
from conformance.properties import Property, check, lets_infinities_go_where_sums_go
from conformance.targets import TorchTarget, on_ptx
from conftest import skip_where_torch_reads_past_rows
from helpers import Problem, eager, products_that_read_past_rows, torch_reads_past_rows

LEFT_BY_OTHERS = {
    "AFA_KERNELS_BACKEND": "reference",
    "TORCH_COMPILE_DISABLE": "1",
    "WORLD_SIZE": "8",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "HF_HUB_OFFLINE": "0",
    "HF_HOME": "/nowhere",
}
CHOSEN = {"AFA_CPU_ISA": "avx2", "OMP_NUM_THREADS": "3", "TRITON_INTERPRET": "0", "AFA_KERNELS_REQUIRE": "cpu"}


def test_the_environment_of_the_caller_stays_outside():
    code = "import os, isolation; print({name: os.environ.get(name) for name in %r})" % [*LEFT_BY_OTHERS, *CHOSEN]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | LEFT_BY_OTHERS | CHOSEN,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    seen = eval(done.stdout)
    assert {name: seen[name] for name in CHOSEN} == CHOSEN
    assert seen.pop("HF_HUB_OFFLINE") == "1"
    home = seen.pop("HF_HOME")
    assert home != "/nowhere" and not os.path.exists(os.path.dirname(home)), "left behind"
    assert not any(seen[name] for name in LEFT_BY_OTHERS if name in seen)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "dy"])
def test_no_product_of_a_baseline_has_gaps_between_its_rows(name):
    """On some processors such a 16-bit product of torch reads the gaps."""
    problem = Problem.random(20, 200, 120, 8, torch.bfloat16)
    setattr(problem, name, placed(getattr(problem, name), "rows apart"))
    leaves = {n: getattr(problem, n).detach().requires_grad_() for n in ("x", "weight", "bias", "lora_a", "lora_b")}
    with products_that_read_past_rows():
        assert torch_reads_past_rows()
        y = eager(**leaves, alpha_t=0.4)
        gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    assert all(torch.isfinite(t).all() for t in (y, *gradients))


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_nor_has_one_in_the_random_problems(kind):
    for number in range(12):
        problem = RandomProblem.random(on_ptx("nvcc-sm_80"), kind, number)
        with products_that_read_past_rows():
            result = problem.plain()
        assert all(torch.isfinite(t).all() for t in result.values()), str(problem)


@pytest.mark.fast
@pytest.mark.parametrize("kind", TorchTarget("torch").kinds())
def test_infinities_in_the_random_problems_are_no_fault_of_this_package(kind):
    promise = Property(lets_infinities_go_where_sums_go, draw={"dropout": False})
    for number in range(12):
        with products_that_read_past_rows():
            check(TorchTarget("torch"), kind, promise, number)


@pytest.mark.fast
def test_torch_itself_is_not_asked_for_more():
    """The backend ``torch`` hands rows with gaps to torch as they are: its tests look whether torch can take them."""
    for dtype, backend in ((torch.bfloat16, "cpu"), (torch.float32, "torch")):
        with products_that_read_past_rows():
            skip_where_torch_reads_past_rows(backend, dtype)
    with products_that_read_past_rows(), pytest.raises(pytest.skip.Exception, match="reads what lies between rows"):
        skip_where_torch_reads_past_rows("torch", torch.bfloat16)


@pytest.mark.fast
def test_a_fast_test_cannot_start_a_process():
    with pytest.raises(AssertionError, match="mark it with pytest.mark.long"):
        subprocess.run([sys.executable, "-c", ""])
