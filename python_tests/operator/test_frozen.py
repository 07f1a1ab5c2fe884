"""The order of the frozen products around the branch."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from afa_kernels.operator import shared_input_ops

pytestmark = pytest.mark.fast


class Products(TorchDispatchMode):
    """Notes which operand of each product is one of the weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.order = weights, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.order += [i for i, weight in enumerate(self.weights) for t in args if t is weight]
        return function(*args, **(kwargs or {}))


class Branches:
    """A backend whose branches add a given part to dx."""

    def __init__(self, part, gemm_first):
        self.part, self.gemm_first = part, lambda *_: gemm_first

    def backward_shared(self, dys, x, members, zs, *, dx=None, **needs):
        return (self.part.clone() if dx is None else dx + self.part), [], []


@pytest.mark.parametrize("gemm_first", [False, True])
def test_the_backward_goes_from_the_last_layer_to_the_first(gemm_first):
    weights = [torch.randn(4, 5) for _ in range(3)]
    dys, every = [torch.randn(2, 4) for _ in range(3)], [True] * 3
    x, part = torch.randn(2, 5), torch.randn(2, 5)
    members = [SimpleNamespace(spec=None)] * 3
    with Products(weights) as products:
        dx, _, _ = shared_input_ops._together(
            Branches(part, gemm_first), dys, x, weights, members, dys, range(3), True, every, every
        )
    assert products.order == [2, 1, 0]
    torch.testing.assert_close(dx, part + sum(dy @ weight for dy, weight in zip(dys, weights, strict=True)))
