"""Calls of the operator with rows by owner, and the ordinary calls that they stand for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import afa_kernels as afa
from afa_kernels.backend import choice
from afa_kernels.backend.interface import Call

# Those that run such calls on CPU tensors, natively or owner by owner.
BACKENDS = ("cpu", "torch", "reference")
OF_BRANCH = ("x", "lora_a", "lora_b", "base")
OF_LINEAR = ("x", "weight", "bias", "lora_a", "lora_b")


@dataclass
class ByOwner:
    """One random call with its incoming gradient; ranks, alpha_t and scaling differ from owner to owner."""

    x: Tensor
    offsets: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    base: Tensor
    dy: Tensor
    alpha_t: Tensor
    scaling: Tensor
    ranks: Tensor

    @staticmethod
    def random(sizes, k, n, r, dtype=torch.float32, *, adapter_dtype=None, tail=0, ranks=None) -> "ByOwner":
        owners, rows = len(sizes), sum(sizes) + tail

        def draw(*shape, scale=1.0, to=dtype):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(to)

        adapter_dtype = adapter_dtype or dtype
        return ByOwner(
            x=draw(rows, k),
            offsets=torch.tensor(sizes).cumsum(0).to(torch.int32),
            weight=draw(owners, n, k, scale=k**-0.5),
            bias=draw(owners, n),
            lora_a=draw(owners, r, k, scale=k**-0.5, to=adapter_dtype),
            lora_b=draw(owners, n, r, scale=r**-0.5, to=adapter_dtype),
            base=draw(rows, n),
            dy=draw(rows, n),
            alpha_t=torch.rand(owners),
            scaling=torch.rand(owners) + 0.5,
            ranks=torch.randint(1, r + 1, (owners,)).int() if ranks is None else torch.tensor(ranks).int(),
        )

    def changed(self, **fields) -> "ByOwner":
        return replace(self, **fields)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield each owner with its rows, which may be none."""
        start = 0
        for owner, end in enumerate(self.offsets.tolist()):
            yield owner, slice(start, end)
            start = end

    def of_owners(self) -> dict[str, Tensor]:
        return {"alpha_t": self.alpha_t, "scaling": self.scaling, "ranks": self.ranks}

    def leaves(self, names) -> dict[str, Tensor]:
        return {name: getattr(self, name).detach().clone().requires_grad_() for name in names}

    def lora(self, leaves=None, **options) -> Tensor:
        tensors = leaves or {name: getattr(self, name) for name in OF_BRANCH}
        return afa.afa_lora(offsets=self.offsets, **tensors, **(self.of_owners() | options))

    def linear(self, leaves=None, **options) -> Tensor:
        tensors = leaves or {name: getattr(self, name) for name in OF_LINEAR}
        return afa.afa_linear(offsets=self.offsets, **tensors, **(self.of_owners() | options))

    def run(self, call, names, **options) -> dict[str, Tensor]:
        """Return the output of ``call`` (:meth:`lora` or :meth:`linear`) and the gradient of every leaf by name."""
        leaves = self.leaves(names)
        y = call(leaves, **options)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def takes_owners(name: str) -> bool:
    call = Call("cpu", torch.float32, 8, 8, 8, 8, "silu", owners=2)
    return choice.get(name).why_not(call) is None
