"""A forward and a backward of the CUDA kernels, by default on the emulator."""

import torch

from afa_kernels.backend import choice
from afa_kernels.operator.options import Spec


def forward_and_backward(problem, *, seed=None, spec=None, save_z=True, need=(True, True, True), name="cuda_emulated"):
    """Call the backend itself, so that no autograd stands between; return (y, z, dx, da, db)."""
    spec = spec or Spec("silu", 1.5)
    alpha_t = torch.tensor(0.3)
    backend = choice.get(name)
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


def kernel_names(launches) -> list[str]:
    """Return the names of kernels without what the compiler adds to them."""
    mangled = [launch["kernel"].partition("_kernelI")[0] for launch in launches]
    return [name.removeprefix("_ZN3afa").lstrip("0123456789") for name in mangled]


def held(weight: torch.Tensor, how: str) -> torch.Tensor:
    """Return a float32 weight that lies in memory in another way, between NaN that belong to nobody."""
    weight = weight.float()
    rows, cols = weight.shape
    around = torch.full((rows + 1, cols + 9), torch.nan)
    if how == "rows apart":  # rows of whole vectors
        around = torch.full((rows, (cols + 7) // 4 * 4), torch.nan)
        place = around[:, :cols]
    elif how == "misaligned":
        place = around[1:, 3 : 3 + cols]
    elif how == "transposed":
        place = torch.full((cols, rows + 5), torch.nan)[:, :rows].T
    else:
        assert how == "dense"
        return weight.clone()
    return place.copy_(weight)
