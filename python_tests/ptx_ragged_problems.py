"""Random ragged calls of the triton kernels on the PTX machine: compared with float64, and under two
schedules that must agree to the bit."""

import random

from helpers import poisoned_memory, run
from ptx_problems import RandomProblem, TritonTarget
from ragged_calls import assert_bits
from ragged_gpu_problems import RaggedProblem

RANKS = ((16,), (33, 64), (8, 20, 32), (100, 128))  # of the problems, by turns


class RandomRaggedProblem:
    def __init__(self, where: TritonTarget, number: int):
        self.where, self.number = where, number
        self.problem = RaggedProblem(number, 200, 264, RANKS[number % 4])

    def __str__(self) -> str:
        return f"ragged problem {self.number} of {self.where.backend} on {self.where.arch}: {self.problem}"

    check_or_known = RandomProblem.check_or_known

    def check(self, *, pipelined: bool = True) -> None:
        """Each group also against a call with it alone."""
        problem, draw = self.problem, random.Random(self.number)
        choices = self.where.choices(draw, problem.dtype.itemsize, problem.r, pipelined=pipelined)
        with choices, poisoned_memory():
            self.where.set_seed(1000 * self.number)
            first = problem.check()
            problem.check_groups_alone(first)
            self.where.set_seed(1000 * self.number + 500)
            again = run(problem.call, problem.problem, problem.names, needed=problem.needed)
        assert_bits(first, again, "depends on the schedule")
