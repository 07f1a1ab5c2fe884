"""The order of a GPU's products by owner and the branch, on CPU tensors that are taken for those of a GPU."""

from types import SimpleNamespace

import pytest
import torch
from conftest import skip_unless_available, skip_unless_taken
from helpers import assert_as_accurate_as_torch
from torch.utils._python_dispatch import TorchDispatchMode

import afa_kernels as afa
from afa_kernels import torch_private
from afa_kernels.backend.interface import Rows
from afa_kernels.operator import frozen

pytestmark = pytest.mark.skipif(not torch_private.has_grouped_mm(), reason="needs grouped_mm")


@pytest.fixture
def on_device(monkeypatch):
    monkeypatch.setattr(frozen, "_on_device", lambda t: True)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


def test_the_product_comes_first(on_device):
    dy, weight = torch.randn(7, 16), torch.randn(2, 16, 24)
    rows = Rows(torch.tensor([3, 7], dtype=torch.int32), None, None)
    with Operations() as operations:
        backend = SimpleNamespace(gemm_first=lambda *_: False)
        dx = frozen.begin_backward(backend, None, dy, weight, rows)
    assert "_grouped_mm" in operations.names
    torch.testing.assert_close(dx, torch.cat([dy[:3] @ weight[0], dy[3:] @ weight[1]]))


def test_no_rows_are_multiplied(on_device, monkeypatch):
    """Of a batch that is empty; grouped_mm need not take it."""
    monkeypatch.setattr(torch_private, "grouped_mm", None)
    shapes = ((0, 16), (2, 24, 16), (2, 24), (2, 8, 16), (2, 24, 8))
    leaves = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    x, weight, bias, a, b = leaves
    offsets = torch.zeros(2, dtype=torch.int32)
    y = afa.afa_linear(x, weight, bias, a, b, 0.4, offsets=offsets)
    gradients = torch.autograd.grad(y, leaves, y.detach())
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_backend_of_a_gpu_adds_to_the_product(on_device, monkeypatch, backend, dropout_p, dtype):
    skip_unless_available(backend)
    skip_unless_taken(backend, dtype)
    torch.manual_seed(1)
    sizes, k, n, r = (30, 0, 65, 2), 72, 80, 12
    x, dy, weight = torch.randn(97, k), torch.randn(97, n), torch.randn(4, n, k) * k**-0.5
    a, b = torch.randn(4, r, k) * k**-0.5, torch.randn(4, n, r) * r**-0.5
    offsets = torch.tensor(sizes).cumsum(0).int()
    ranks = torch.tensor([12, 5, 7, 0], dtype=torch.int32)

    def gradients(name, wide):
        leaves = [t.to(dtype).to(wide).requires_grad_() for t in (x, a, b)]
        own = {"ranks": ranks, "dropout_p": dropout_p, "dropout_seed": 77, "backend": name}
        frozen_part = weight.to(dtype).to(wide), None
        y = afa.afa_linear(leaves[0], *frozen_part, *leaves[1:], 0.4, offsets=offsets, **own)
        return torch.autograd.grad(y, leaves, dy.to(dtype).to(wide))

    got = gradients(backend, dtype)
    monkeypatch.undo()
    plain, truth = gradients("torch", dtype), gradients("reference", torch.float64)
    for what, *values in zip(("dx", "da", "db"), got, plain, truth, strict=True):
        assert_as_accurate_as_torch(*values, what, dtype)
