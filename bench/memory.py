"""Bytes that a call allocates and saves, counted in a pass of their own, never while timing."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class Memory(NamedTuple):
    peak: int  # most bytes held at once beyond what was there before
    allocated: int  # sum of all allocations
    saved: int  # bytes of tensors saved for the backward that are not operands


def saved_bytes(forward: Callable[[], Tensor], operands: Iterable[Tensor]) -> int:
    """Return the bytes that ``forward`` keeps for its backward, each storage once, without those of
    ``operands``."""
    known = {t.untyped_storage().data_ptr() for t in operands}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
        total = sum(found.values())
    del y
    return total


def allocations(call: Callable[[], object]) -> tuple[int, int]:
    """Return the peak and the sum of what ``call`` allocates through torch on the CPU. Its result
    counts as held until the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    held = peak = total = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            total += max(0, event.nbytes())
            peak = max(peak, held)
    return peak, total


def cuda_allocations(call: Callable[[], object]) -> tuple[int, int]:
    """As :func:`allocations`, from the counters of torch's CUDA allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    result = call()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    del result
    peak = after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"]
    return peak, after["allocated_bytes.all.allocated"] - before["allocated_bytes.all.allocated"]


def memory_of(
    forward: Callable[[], Tensor], call: Callable[[], object], operands: Iterable[Tensor], device: str
) -> Memory:
    on_gpu = torch.device(device).type == "cuda"
    peak, allocated = (cuda_allocations if on_gpu else allocations)(call)
    return Memory(peak, allocated, saved_bytes(forward, operands))
