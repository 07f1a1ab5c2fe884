"""A forward and a backward of the CUDA kernels, by default on the emulator."""

import torch

from afa_kernels.backend import registry
from afa_kernels.options import Spec


def forward_and_backward(problem, *, seed=None, spec=None, save_z=True, need=(True, True, True), name="cuda_emulated"):
    """Call the backend itself, so that no autograd stands between; return (y, z, dx, da, db)."""
    spec = spec or Spec("silu", 1.5)
    alpha_t = torch.tensor(0.3)
    backend = registry.get(name)
    operands = (problem.x, problem.lora_a, problem.lora_b)
    y = torch.empty_like(problem.base)
    z = backend.forward(*operands, alpha_t, seed, spec, base=problem.base, out=y, save_z=save_z)
    grads = backend.backward(
        problem.dy,
        *operands,
        z,
        alpha_t,
        seed,
        spec,
        need_dx=need[0],
        need_da=need[1],
        need_db=need[2],
    )
    return (y, z, *grads)


def same(left, right):
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(left, right, strict=True)
    )
