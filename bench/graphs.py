"""Calls in CUDA graphs and on streams of their own; a CPU, which has neither, just makes them."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor


def in_graph(function: Callable[[], tuple[Tensor, ...]], device: str) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Capture a function in a CUDA graph; return its results and what replays it. A CPU calls it again."""
    if device != "cuda":
        results = function()

        def again() -> None:
            for kept, new in zip(results, function(), strict=True):
                kept.copy_(new)

        return results, again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return results, graph.replay


def beside(device: str):
    """A stream of its own, behind what runs on the current one."""
    if device != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
