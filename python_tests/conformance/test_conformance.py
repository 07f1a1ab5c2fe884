"""Every promise (properties.py) on every backend (targets.py), for each kind of call (problems.py)."""

import os

import pytest
from conformance.problems import Problem
from conformance.properties import PROPERTIES, Property, refuses_with_a_reason
from conformance.targets import Target, of_this_process
from conftest import SIMULATED_GPU, skip_unless_available
from helpers import run_on_isa

from afa_kernels.backend import compiled, cpu

TARGETS = {where.name: where for where in of_this_process(SIMULATED_GPU, os.environ.get("TRITON_INTERPRET") == "1")}
CASES = [
    pytest.param(where, kind, promise, id=f"{where.name}-{kind}-{promise.name}")
    for where in TARGETS.values()
    for promise in PROPERTIES
    for kind in promise.kinds
    if kind in where.kinds() and (where.exact or not promise.exact)
]
ISAS = compiled._C.cpu_isas() if cpu.BACKEND.status() else []


def check(where: Target, kind: str, promise: Property, numbers) -> None:
    with where.running():
        for number in numbers:
            problem = Problem.random(where, kind, number, **promise.draw)
            with where.choices(problem):
                promise.holds(where, problem)


@pytest.mark.fast
@pytest.mark.parametrize("where, kind, promise", CASES)
def test_promise(where, kind, promise, simulated_gpu):
    skip_unless_available(where.backend_name)
    if simulated_gpu is not None and where.name.startswith("triton"):
        where.machine = simulated_gpu
    check(where, kind, promise, range(where.problems if promise is PROPERTIES[0] else where.others))


@pytest.mark.parametrize("where", TARGETS.values(), ids=TARGETS)
def test_refusals(where):
    skip_unless_available(where.backend_name)
    with where.running():
        refuses_with_a_reason(where)


def check_cpu(numbers) -> None:
    """Every promise of the CPU backend, on the instruction set of this process."""
    where = TARGETS["cpu"]
    for promise in PROPERTIES:
        for kind in promise.kinds:
            check(where, kind, promise, numbers)


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_on_isa(isa, "from conformance.test_conformance import check_cpu\ncheck_cpu(range(1000, 1012))")
