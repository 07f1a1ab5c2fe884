"""Ragged problems, and the ordinary calls that they stand for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import afa_kernels as afa
from afa_kernels.backend import choice
from afa_kernels.backend.interface import Call, Rows

# Those that run ragged calls on CPU tensors, natively or group by group.
BACKENDS = ("cpu", "torch", "reference")
OF_BRANCH = ("x", "lora_a", "lora_b", "base")
OF_LINEAR = ("x", "weight", "bias", "lora_a", "lora_b")


class Owners(NamedTuple):
    """What the owners of rows bring to a call of a backend beside A and B."""

    offsets: Tensor
    ranks: Tensor | None
    alpha_t: Tensor | None
    scaling: Tensor | None

    @property
    def rows(self) -> Rows:
        return Rows(self.offsets, self.ranks, self.scaling)


@dataclass
class Ragged:
    """One random ragged call with its incoming gradient; ranks, alpha_t and scaling differ from group to group."""

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
    def random(sizes, k, n, r, dtype=torch.float32, *, adapter_dtype=None, tail=0, ranks=None) -> "Ragged":
        groups, rows = len(sizes), sum(sizes) + tail

        def draw(*shape, scale=1.0, to=dtype):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(to)

        adapter_dtype = adapter_dtype or dtype
        return Ragged(
            x=draw(rows, k),
            offsets=torch.tensor(sizes).cumsum(0).to(torch.int32),
            weight=draw(groups, n, k, scale=k**-0.5),
            bias=draw(groups, n),
            lora_a=draw(groups, r, k, scale=k**-0.5, to=adapter_dtype),
            lora_b=draw(groups, n, r, scale=r**-0.5, to=adapter_dtype),
            base=draw(rows, n),
            dy=draw(rows, n),
            alpha_t=torch.rand(groups),
            scaling=torch.rand(groups) + 0.5,
            ranks=torch.randint(1, r + 1, (groups,)).int() if ranks is None else torch.tensor(ranks).int(),
        )

    def changed(self, **fields) -> "Ragged":
        return replace(self, **fields)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield each group with its rows, which may be none."""
        start = 0
        for group, end in enumerate(self.offsets.tolist()):
            yield group, slice(start, end)
            start = end

    def of_groups(self) -> dict[str, Tensor]:
        return {"alpha_t": self.alpha_t, "scaling": self.scaling, "ranks": self.ranks}

    def leaves(self, names) -> dict[str, Tensor]:
        return {name: getattr(self, name).detach().clone().requires_grad_() for name in names}

    def lora(self, leaves=None, **options) -> Tensor:
        tensors = leaves or {name: getattr(self, name) for name in OF_BRANCH}
        return afa.afa_lora(offsets=self.offsets, **tensors, **(self.of_groups() | options))

    def linear(self, leaves=None, **options) -> Tensor:
        tensors = leaves or {name: getattr(self, name) for name in OF_LINEAR}
        return afa.afa_linear(offsets=self.offsets, **tensors, **(self.of_groups() | options))

    def run(self, call, names, **options) -> dict[str, Tensor]:
        """Return the output of ``call`` (:meth:`lora` or :meth:`linear`) and the gradient of every leaf by name."""
        leaves = self.leaves(names)
        y = call(leaves, **options)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def alone(p: Ragged, group: int, rows: slice, **options) -> dict[str, Tensor]:
    """Return the output and the gradients of ``afa_lora`` with the rows, A and B of one group."""
    rank = int(p.ranks[group])
    leaves = {
        "x": p.x[rows],
        "lora_a": p.lora_a[group, :rank],
        "lora_b": p.lora_b[group, :, :rank],
        "base": p.base[rows],
    }
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    y = afa.afa_lora(**leaves, alpha_t=float(p.alpha_t[group]), scaling=float(p.scaling[group]), **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), p.dy[rows])
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def takes_ragged(name: str) -> bool:
    call = Call("cpu", torch.float32, 8, 8, 8, 8, "silu", owners=2)
    return choice.get(name).why_not(call) is None
