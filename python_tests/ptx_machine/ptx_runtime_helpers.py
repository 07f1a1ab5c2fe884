"""The simulated CUDA runtime (ptx_machine/cuda) and the compiled kernels, for tests that let it fail or overlap."""

import ptx_cuda
import pytest
import torch
from helpers import Problem

from afa_kernels.operator.options import Spec

cuda_on_ptx = pytest.importorskip("afa_kernels._cuda_on_ptx", reason="built with nvcc and AFA_BUILD_PTX_MACHINE=1 only")
runtime = cuda_on_ptx.runtime

SPEC, ALPHA_T = Spec("relu", 1.5), torch.tensor(0.3)
RTX_4090 = {"major": 8, "minor": 9, "multiprocessors": 128, "shared_per_block": 99 << 10,
            "shared_per_multiprocessor": 100 << 10}  # fmt: skip
CAPABILITIES = {0: (8, 0), 1: (9, 0)}


@pytest.fixture(autouse=True)
def sound_machine():
    runtime.restart()
    cuda_on_ptx.take_launches()
    yield
    runtime.restart()
    cuda_on_ptx.set_edit(lambda text: text)


def problem(m=75, k=136, n=264, r=16):
    torch.manual_seed(2)
    return Problem.random(m, k, n, r, torch.bfloat16)


def forward(p, device=0, stream=0):
    y = torch.full_like(p.base, torch.nan)
    with ptx_cuda.kernels.on(device, stream):
        z = ptx_cuda.kernels.forward(
            p.x, p.lora_a, p.lora_b, ALPHA_T, None, SPEC, base=p.base, out=y, save_z=True
        )  # fmt: skip
    return y, z


def failure(p, device=0, stream=0) -> str:
    """Return the message of a forward, which must fail."""
    with pytest.raises(RuntimeError) as caught:
        forward(p, device, stream)
    return str(caught.value)


def new_device(**model) -> int:
    """Return a device that no test has used: the launch code remembers what it has asked of one."""
    index = runtime.add_device(**({"major": 8, "minor": 0} | model))
    CAPABILITIES[index] = (model.get("major", 8), model.get("minor", 0))
    return index


@pytest.fixture
def kept_allocations(monkeypatch):
    """Keep what a capture has allocated, as torch's allocator does for a graph."""
    kept, new_empty = [], torch.Tensor.new_empty

    def keep(*arguments, **options):
        kept.append(new_empty(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", keep)
