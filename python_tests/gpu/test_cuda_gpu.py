"""The CUDA kernels on a real GPU beside the same kernels on the PTX machine."""

import ptx_cuda
import pytest
import torch
from conftest import skip_unless_available
from helpers import Problem

import afa_kernels as afa
from afa_kernels.backend import choice

PRODUCT = slice(256, 384)  # words of prim_check.cuh's output


@pytest.fixture(autouse=True)
def _gpu_and_machine():
    skip_unless_available("cuda")
    skip_unless_available(ptx_cuda.NAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_primitives(dtype):
    """ldmatrix, mma, cp.async and the conversions."""
    matrices, values = torch.randn(32, 16).to(dtype), torch.randn(128)

    def primitives(backend: str, device: str) -> torch.Tensor:
        out = torch.zeros(608, dtype=torch.int32, device=device)
        operands = (matrices.to(device), values.to(device), out)
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        kernels = choice.get(backend)._module
        kernels.primitive_check(int(dtype == torch.float16), *(t.data_ptr() for t in operands), 0, stream)
        return out.cpu()

    got, expected = primitives("cuda", "cuda"), primitives(ptx_cuda.NAME, "cpu")
    # Tensor cores group and truncate their sums.
    torch.testing.assert_close(
        got[PRODUCT].view(torch.float32), expected[PRODUCT].view(torch.float32), rtol=0, atol=1e-4
    )
    got[PRODUCT] = expected[PRODUCT]
    assert torch.equal(got, expected)


def test_a_layer():
    problem = Problem.random(100, 136, 264, 16, torch.bfloat16)

    def results(backend: str, device: str) -> list[torch.Tensor]:
        x, a, b, base, dy = (getattr(problem, n).to(device) for n in ("x", "lora_a", "lora_b", "base", "dy"))
        leaves = [t.requires_grad_() for t in (x, a, b)]
        y = afa.afa_lora(*leaves, 0.3, base=base, dropout_p=0.1, dropout_seed=11, backend=backend)
        return [t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, leaves, dy))]

    for got, expected in zip(results("cuda", "cuda"), results(ptx_cuda.NAME, "cpu"), strict=True):
        assert (got - expected).norm() <= 2e-2 * expected.norm()
