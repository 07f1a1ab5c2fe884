"""The times that gpu_model.py asks for, on a card. All but ``load`` and ``kernels`` also run on the CPU, for the tests.

Every time is a median of interleaved rounds (gpu_figures.medians); a kernel's own is the mean of the profiler's.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from afa_kernels import AFALinear, AFASharedInput
from bench.model.cuda_launches import Layer
from tools.gpu_figures import medians
from tools.gpu_steps import Context

_REPEATS = 20  # of a short call, in a graph
_CHAIN = 1 << 26  # places of 4 bytes: 256 MB, beyond L2
_LOADS = 2000
_TOKEN_LAYERS = 8  # that one after the other read their weights, together beyond L2
_PROFILED = 20  # calls
# Demangled or not.
_KERNEL = re.compile(r"afa(?:::|\d+)(forward|project|expand|project_dy|dy|db|x|pack|reduce)_kernel")


class Event(NamedTuple):
    """Something that ran on the device, in nanoseconds."""

    name: str
    start: int
    end: int


class CardMeter:
    def __init__(self, context: Context):
        self.context, self.device = context, context.device

    def mapped(self, nbytes: int) -> float:
        source = torch.zeros(nbytes // 4, device=self.device)
        target = torch.empty_like(source)
        return self._in_graph(lambda: torch.neg(source, out=target))

    def launch(self) -> float:
        nothing = torch.empty(1, device=self.device)
        return self._in_graph(lambda: nothing.fill_(1.0))

    def hidden(self) -> float:
        """Kernels of this package that do next to nothing, among themselves and by turns with others: only behind one
        of its own may such a kernel begin before that one has ended."""
        operands = [
            torch.zeros(count, dtype=dtype, device=self.device)
            for count, dtype in ((512, torch.bfloat16), (128, torch.float32), (608, torch.int32))
        ]
        pointers = [operand.data_ptr() for operand in operands]
        nothing = torch.empty(1, device=self.device)

        def ours() -> None:
            stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
            self.context.native.primitive_check(0, *pointers, 0, stream)

        def other() -> None:
            nothing.fill_(1.0)

        def by_turns() -> None:
            ours()
            other()

        return max(0.0, self._in_graph(by_turns) - self._in_graph(ours) - self._in_graph(other))

    def load(self) -> float:
        from tools.gpu_chase import chase  # Triton comes with torch for CUDA alone

        chain = torch.randperm(_CHAIN, device=self.device).int()
        multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return self._seconds({"load": lambda: chase(chain, _LOADS, multiprocessors)})["load"] / _LOADS

    def gemm(self, m: int, k: int, n: int) -> tuple[float, float]:
        x, weight, y = (self._half(*shape) for shape in ((m, k), (n, k), (m, n)))
        taken = self._seconds({"product": lambda: torch.mm(x, weight.T, out=y), "added": lambda: y.addmm_(x, weight.T)})
        return taken["product"], taken["added"]

    def kernels(self, layer: Layer) -> tuple[dict[str, float], dict[str, float]]:
        x, dys, leaves, _, call = self._layer(layer)
        torch.autograd.grad(call(x), leaves, dys)
        calls = 1 if self.context.small else _PROFILED
        taken = Counter(), Counter()
        for _ in range(calls):
            ys, forward = self.recorded(call, x)
            _, backward = self.recorded(torch.autograd.grad, ys, leaves, dys)
            for seconds, events in zip(taken, (forward, backward), strict=True):
                seconds.update(by_kernel(events))
        forward, backward = ({name: seconds / calls for name, seconds in each.items()} for each in taken)
        return forward, backward

    def recorded(self, call: Callable, *arguments) -> tuple[object, list[Event]]:
        """Return what ``call`` returns, and all that ran on the device."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            result = call(*arguments)
            torch.cuda.synchronize()
        events = profiler.profiler.kineto_results.events()
        on_device = [event for event in events if event.device_type() == DeviceType.CUDA]
        return result, [Event(e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in on_device]

    def step(self, layer: Layer, alpha_t: float) -> tuple[float, float]:
        x, dys, leaves, weights, call = self._layer(layer, alpha_t)
        ys, dx = [torch.empty_like(dy) for dy in dys], torch.empty_like(x)

        @torch.no_grad()
        def frozen() -> None:
            for weight, y, dy in zip(weights, ys, dys, strict=True):
                torch.mm(x, weight.T, out=y)
                torch.mm(dy, weight, out=dx)

        taken = self._seconds({"step": lambda: torch.autograd.grad(call(x), leaves, dys), "frozen": frozen})
        return taken["step"], taken["frozen"]

    @torch.no_grad()
    def token(self, layer: Layer) -> tuple[float, float]:
        calls = [self._layer(layer) for _ in range(_TOKEN_LAYERS)]

        def whole() -> None:
            for x, *_, call in calls:
                call(x)

        def frozen() -> None:
            for x, _, _, weights, _ in calls:
                for weight in weights:
                    F.linear(x, weight)

        return tuple(self._in_graph(function) / _TOKEN_LAYERS for function in (whole, frozen))

    def _layer(
        self, layer: Layer, alpha_t: float = 0.5
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Callable]:
        """Return x, every dy, what is differentiated, the weights, and a call. A and B are float32 beside 16 bits."""
        members = []
        for n, r in layer.members:
            base = nn.Linear(layer.k, n, bias=False, device=self.device, dtype=torch.bfloat16)
            member = AFALinear(base, r, backend=self.context.backends[0])
            nn.init.normal_(member.lora_b)
            member.set_alpha_t(alpha_t)
            members.append(member)
        together = AFASharedInput(members) if len(members) > 1 else lambda x: (members[0](x),)
        x = self._half(layer.m, layer.k).requires_grad_()
        dys = [self._half(layer.m, n) for n, _ in layer.members]
        leaves = [x, *(p for member in members for p in (member.lora_a, member.lora_b))]
        return x, dys, leaves, [member.weight for member in members], together

    def _half(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).bfloat16()

    def _seconds(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        return {name: ms * 1e-3 for name, ms in medians(calls, self.context).items()}

    def _in_graph(self, call: Callable[[], object]) -> float:
        """Return the seconds of one of many calls in a CUDA graph, in which the CPU is never waited for."""

        def repeated() -> None:
            for _ in range(_REPEATS):
                call()

        if self.device == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                repeated()
            repeated = graph.replay
        return self._seconds({"graph": repeated})["graph"] / _REPEATS


def by_kernel(events: Iterable[Event]) -> dict[str, float]:
    """Return the seconds of the kernels of this package among ``events``, summed by the model's names.

    With programmatic dependent launch a kernel starts while the one before it runs, and waits for it: its time counts
    from that one's end.
    """
    seconds: dict[str, float] = {}
    free = 0
    for name, start, end in sorted(events, key=lambda event: event.start):
        found = _KERNEL.search(name)
        if found:
            seconds[found[1]] = seconds.get(found[1], 0.0) + max(0, end - max(start, free)) * 1e-9
        free = max(free, end)
    return seconds
