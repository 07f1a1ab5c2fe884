"""Random ragged calls on the PTX machine, for each target of ptx_problems.py: compared with float64, and under two
schedules that must agree to the bit."""

import random

from cuda_ragged import assert_bits, random_problem
from helpers import poisoned_memory, run
from ptx_problems import CudaTarget, RandomProblem, TritonTarget
from ragged_gpu_problems import RaggedProblem

RANKS = ((16,), (33, 64), (8, 20, 32), (100, 128))  # of the problems of the triton kernels, by turns


class RandomRaggedProblem:
    def __init__(self, where: CudaTarget | TritonTarget, number: int):
        self.where, self.number = where, number
        if isinstance(where, CudaTarget):
            self.problem = random_problem(number, sizes=(0, 1, 17, 65))
        else:
            self.problem = RaggedProblem(number, 200, 264, RANKS[number % 4])

    def __str__(self) -> str:
        return f"ragged problem {self.number} of {self.where.backend} on {self.where.arch}: {self.problem}"

    def check(self, *, pipelined: bool = True) -> None:
        if isinstance(self.where, CudaTarget):
            self._check_cuda()
        else:
            self._check_triton(pipelined)

    check_or_known = RandomProblem.check_or_known

    def _check_cuda(self) -> None:
        self.where.set_seed(1000 * self.number)
        first = self.problem.check(self.where.backend)
        self.where.set_seed(1000 * self.number + 500)
        assert_bits(first, self.problem.run(self.where.backend), "depends on the schedule")

    def _check_triton(self, pipelined: bool) -> None:
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
