"""Arithmetic and traffic of a case: what its work must cost at the least.

A layer is a GEMM ``y = x W^T`` and its branch; the branch costs ``2 M r (K + N)`` FLOP in the
forward and twice that in the backward. Bytes are those of the large operands, each passed over
once: the forward branch reads x and writes y, the backward one reads dy and x and writes dx (the
GEMM that accumulates into y and dx reads them behind its products).
"""

from typing import NamedTuple

from bench.shapes import DTYPES, Case


class Cost(NamedTuple):
    flop: int
    nbytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flop + other.flop, self.nbytes + other.nbytes)

    def milliseconds(self, gflop_s: float, gb_s: float) -> float:
        """Return the time at a rate of arithmetic and one of memory, whichever is longer."""
        return max(self.flop / gflop_s, self.nbytes / gb_s) * 1e-6


FORWARD = ("inference", "forward")
_NOTHING = Cost(0, 0)


def branch(case: Case, step: str) -> Cost:
    """Return the least cost of the branch in ``step``; in the scope "branch" its base is read too,
    and no GEMM hides that."""
    m, k, n, r = case.m, case.k, case.n, case.r
    size, adapter = DTYPES[case.dtype].itemsize, DTYPES[case.adapter_dtype].itemsize * r * (k + n)
    read_base = m * n if case.scope == "branch" else 0
    forward = Cost(2 * m * r * (k + n), size * (m * k + m * n + read_base) + adapter)
    backward = Cost(4 * m * r * (k + n), size * (m * n + 2 * m * k) + 2 * adapter)
    return _of(step, forward, backward)


def frozen(case: Case, step: str) -> Cost:
    """Return the least cost of the frozen layer in ``step``: nothing in the scope "branch"."""
    if case.scope == "branch":
        return _NOTHING
    m, k, n = case.m, case.k, case.n
    size = DTYPES[case.dtype].itemsize
    gemm = Cost(2 * m * k * n, size * (m * k + m * n + n * k))
    return _of(step, gemm, gemm)


def _of(step: str, forward: Cost, backward: Cost) -> Cost:
    if step in FORWARD:
        return forward
    return backward if step == "backward" else forward + backward


def whole(case: Case, step: str) -> Cost:
    """Return the least cost of the layer: the branch's own pass over x and y is one that the GEMM
    makes too, so only its arithmetic adds to the frozen layer's."""
    own, layer = branch(case, step), frozen(case, step)
    return own if layer is _NOTHING else Cost(own.flop + layer.flop, layer.nbytes)
