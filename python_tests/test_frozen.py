"""The order of the frozen products around the branch."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from afa_kernels.backend import frozen

pytestmark = pytest.mark.fast


class Products(TorchDispatchMode):
    """Notes which operand of each product is one of the weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.order = weights, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.order += [i for i, weight in enumerate(self.weights) for t in args if t is weight]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("gemm_first", [False, True])
def test_the_backward_goes_from_the_last_layer_to_the_first(gemm_first):
    backend = SimpleNamespace(gemm_first=lambda *_: gemm_first)
    weights = [torch.randn(4, 5) for _ in range(3)]
    dys = [torch.randn(2, 4) for _ in range(3)]
    part = torch.randn(2, 5)
    with Products(weights) as products:
        dx, *_ = frozen.backward(
            backend, None, list(zip(dys, weights, strict=True)), lambda dx: (part.clone() if dx is None else dx + part,)
        )
    assert products.order == [2, 1, 0]
    torch.testing.assert_close(dx, part + sum(dy @ weight for dy, weight in zip(dys, weights, strict=True)))
