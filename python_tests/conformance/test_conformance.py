"""Every promise (properties.py) on every backend (targets.py), for each kind of call (problems.py)."""

import os

import pytest
from conftest import SIMULATED_GPU, skip_unless_available
from helpers import run_on_isa

from afa_kernels.backend import compiled, cpu
from conformance.properties import PROPERTIES, check, refuses_with_a_reason
from conformance.targets import of_this_process

TARGETS = {where.name: where for where in of_this_process(SIMULATED_GPU, os.environ.get("TRITON_INTERPRET") == "1")}
ACCURACY = PROPERTIES[0]


def marks(where, promise):
    """In Triton's interpreter `make test` looks at accuracy alone: the PTX machine keeps the kernels that Triton
    compiles to every promise, and `make ptx-check` the interpreter too."""
    return pytest.mark.slow if where.interpreted and promise is not ACCURACY else ()


CASES = [
    pytest.param(where, kind, promise, id=f"{where.name}-{kind}-{promise.name}", marks=marks(where, promise))
    for where in TARGETS.values()
    for promise in PROPERTIES
    for kind in promise.kinds
    if kind in where.kinds() and (where.exact or not promise.exact)
]
ISAS = compiled._C.cpu_isas() if cpu.BACKEND.status() and not SIMULATED_GPU else []


@pytest.mark.fast
@pytest.mark.parametrize("where, kind, promise", CASES)
def test_promise(where, kind, promise, simulated_gpu):
    skip_unless_available(where.backend_name)
    if simulated_gpu is not None:
        where.machine = simulated_gpu
    with where.running():
        # Of each dtype and class of ranks, or as many of the same problems: their kernels are compiled by then.
        count = where.count(kind) if promise is ACCURACY else where.others * promise.times
        numbers = [7 * i % where.problems for i in range(count)]
        for number in numbers:
            check(where, kind, promise, number)


@pytest.mark.parametrize("where", TARGETS.values(), ids=TARGETS)
def test_refusals(where):
    skip_unless_available(where.backend_name)
    with where.running():
        refuses_with_a_reason(where)


def check_cpu(numbers) -> None:
    """Every promise of the CPU backend, on the instruction set of this process."""
    where = TARGETS["cpu"]
    for promise in PROPERTIES:
        for kind in [kind for kind in promise.kinds if kind in where.kinds()]:
            for number in numbers:
                check(where, kind, promise, number)


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_on_isa(isa, "from conformance.test_conformance import check_cpu\ncheck_cpu(range(1000, 1012))")
