"""The work that a clock times: a training call or an inference, with hot or cold caches, launched
as written or replayed from a CUDA graph."""

from collections.abc import Callable

import torch

from bench.runner import Runner
from bench.timing import Work

_FLUSHED_BYTES = 1 << 28  # beyond the last-level cache of a CPU socket and the L2 of any GPU
_GRAPH_WARMUPS = 3


def training_work(runner: Runner, cache: str, launch: str) -> Work:
    """Return a forward and a backward, timed apart and as their sum "both"; replayed from a graph
    they are one step."""
    if launch == "graph":
        return _graph(runner, "both", lambda base: runner.backward(runner.forward(base)), cache)
    steps = {"forward": runner.forward, "backward": runner.backward}
    return Work(_cold(runner, runner.prepare) if cache == "cold" else runner.prepare, steps, "both")


def inference_work(runner: Runner, cache: str, launch: str) -> Work:
    """Return a forward without autograd."""
    if launch == "graph":
        return _graph(runner, "inference", runner.inference, cache)
    prepare = _cold(runner, runner.prepare) if cache == "cold" else runner.prepare
    return Work(prepare, {"inference": runner.inference})


def _cold(runner: Runner, prepare: Callable[[], object]) -> Callable[[], object]:
    """Return ``prepare`` followed by writes that evict everything from the caches."""
    flushed = torch.empty(_FLUSHED_BYTES // 4, device=runner.x.device)

    def prepare_and_flush() -> object:
        state = prepare()
        flushed.zero_()
        return state

    return prepare_and_flush


def _graph(runner: Runner, name: str, call: Callable, cache: str) -> Work:
    """Capture ``call`` on static operands."""

    def captured() -> object:
        return call(runner.prepare())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_GRAPH_WARMUPS):
            captured()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()

    prepare = _cold(runner, _nothing) if cache == "cold" else _nothing
    return Work(prepare, {name: lambda state: graph.replay()})


def _nothing() -> None:
    pass
