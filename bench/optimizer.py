"""AdamW's step over the adapters of a model, in the variants that torch has: all of it is torch's own code."""

import torch

from bench.cost import Cost
from bench.memory import Memory, allocations, cuda_allocations
from bench.timing import Work
from bench.transformer import Step

# By the pass of their rows. On a CPU the first is what torch.optim.AdamW takes unless told otherwise.
VARIANTS = {
    "adamw": {"foreach": False, "fused": False},
    "adamw.foreach": {"foreach": True},
    "adamw.fused": {"fused": True},
}
_FLOAT_TENSORS = 7  # read: parameter, gradient, two moments; written: parameter, two moments


def optimizers(step: Step) -> dict[str, torch.optim.AdamW]:
    """Return an optimizer of each variant over the adapters of ``step``, which then have gradients."""
    step()
    return {name: torch.optim.AdamW(step.adapters, lr=1e-5, **options) for name, options in VARIANTS.items()}


def work(name: str, optimizer: torch.optim.AdamW) -> Work:
    return Work(lambda: None, {name: lambda _: optimizer.step()})


def least(step: Step) -> Cost:
    """Return the bytes that a step must pass over; its arithmetic does not count beside them."""
    return Cost(0, _FLOAT_TENSORS * sum(p.nbytes for p in step.adapters))


def memory(optimizer: torch.optim.AdamW) -> Memory:
    optimizer.step()  # the first step allocates the state
    on_gpu = optimizer.param_groups[0]["params"][0].is_cuda
    return Memory(*(cuda_allocations if on_gpu else allocations)(optimizer.step), saved=0)
