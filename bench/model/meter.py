"""What a card takes for the kernels and layers of the model, for on_card.py.

Times are medians of interleaved rounds in one process, on random data: products of zeros run faster.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from afa_kernels import AFALinear, AFASharedInput
from afa_kernels.backend import choice
from bench.graphs import beside, in_graph, wait
from bench.model.cuda_launches import Layer
from bench.timing import Work, clock_of, measure

_REPEATS = 20  # of a short call, in a graph
_PROFILED = 20  # calls
# Demangled or not.
_KERNEL = re.compile(r"afa(?:::|\d+)(forward|project|expand|project_dy|dy|db|x|pack|reduce)_kernel")


class Card(Protocol):
    """What is asked of a card."""

    device: str
    cuda: str  # the backend of its CUDA kernels
    small: bool  # whether it is a stand-in, which cannot be asked for much


def seconds_of(calls: dict[str, Callable[[], object]], card: Card) -> dict[str, float]:
    """Return the median seconds of each function."""
    works = {
        name: Work(prepare=lambda: None, steps={"call": lambda _, call=call: call()}) for name, call in calls.items()
    }
    measure(works, clock_of(card.device), seconds=0.05 if card.small else 1.0)
    return {name: statistics.median(work.samples["call"]) * 1e-3 for name, work in works.items()}


def half(card: Card, *shape: int) -> Tensor:
    return torch.randn(*shape, device=card.device).bfloat16()


class Event(NamedTuple):
    """Something that ran on the device, in nanoseconds."""

    name: str
    start: int
    end: int


_LANES, _WARPS = 32, 8  # of a warp; on a multiprocessor: enough to keep the memory busy, too few to fill its queues
_CHAIN = 1 << 26  # places of 4 bytes: 256 MB, beyond L2
_LOADS = 2000
_TOKEN_LAYERS = 8  # that one after the other read their weights, together beyond L2


@triton.jit
def _chase_kernel(chain_ptr, end_ptr, steps, LANES: tl.constexpr):
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    place = lanes
    for _ in range(steps):
        place = tl.load(chain_ptr + place)
    tl.store(end_ptr + lanes, place)


def chase(chain: Tensor, steps: int, multiprocessors: int) -> Tensor:
    """Return where each lane is after ``steps`` loads from ``chain``, a permutation in int32, that wait for each
    other."""
    programs = _WARPS * multiprocessors
    end = torch.empty(programs * _LANES, dtype=torch.int32, device=chain.device)
    _chase_kernel[(programs,)](chain, end, steps, LANES=_LANES, num_warps=1)
    return end


class CardMeter:
    """The times that bench.model.on_card asks for, on a card. A CPU has all but those of ``load`` and ``kernels``."""

    def __init__(self, card: Card):
        self.card, self.device = card, card.device

    def mapped(self, nbytes: int) -> float:
        source = torch.zeros(nbytes // 4, device=self.device)
        target = torch.empty_like(source)
        return self.in_graph(lambda: torch.neg(source, out=target))

    def launch(self) -> float:
        nothing = torch.empty(1, device=self.device)
        return self.in_graph(lambda: nothing.fill_(1.0))

    def nothing(self) -> Callable[[], None]:
        """Return what launches a kernel of this package that does next to nothing."""
        operands = [
            torch.zeros(count, dtype=dtype, device=self.device)
            for count, dtype in ((512, torch.bfloat16), (128, torch.float32), (608, torch.int32))
        ]
        kernels = choice.get(self.card.cuda)._module

        def launch() -> None:
            stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
            kernels.primitive_check(0, *(operand.data_ptr() for operand in operands), 0, stream)

        return launch

    def hidden(self) -> float:
        """Such kernels among themselves and by turns with others: only behind one of its own may such a kernel begin
        before that one has ended."""
        ours, nothing = self.nothing(), torch.empty(1, device=self.device)

        def other() -> None:
            nothing.fill_(1.0)

        def by_turns() -> None:
            ours()
            other()

        return max(0.0, self.in_graph(by_turns) - self.in_graph(ours) - self.in_graph(other))

    def load(self) -> float:
        chain = torch.randperm(_CHAIN, device=self.device).int()
        multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return seconds_of({"load": lambda: chase(chain, _LOADS, multiprocessors)}, self.card)["load"] / _LOADS

    def gemm(self, m: int, k: int, n: int) -> tuple[float, float]:
        x, weight, y = half(self.card, m, k), half(self.card, n, k), half(self.card, m, n)
        taken = seconds_of(
            {"product": lambda: torch.mm(x, weight.T, out=y), "added": lambda: y.addmm_(x, weight.T)}, self.card
        )
        return taken["product"], taken["added"]

    def kernels(self, layer: Layer) -> tuple[dict[str, float], dict[str, float]]:
        x, dys, leaves, _, call = self._layer(layer)
        torch.autograd.grad(call(x), leaves, dys)
        calls = 1 if self.card.small else _PROFILED
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
        frozen, step = self.branch(layer, alpha_t)
        taken = seconds_of({"step": step, "frozen": frozen}, self.card)
        return taken["step"], taken["frozen"]

    def branch(self, layer: Layer, alpha_t: float = 0.5) -> tuple[Callable[[], None], Callable[[], object]]:
        """Return what calls the frozen products alone, and a step of the layer with its branch."""
        x, dys, leaves, weights, call = self._layer(layer, alpha_t)
        ys, dx = [torch.empty_like(dy) for dy in dys], torch.empty_like(x)

        @torch.no_grad()
        def frozen() -> None:
            for weight, y, dy in zip(weights, ys, dys, strict=True):
                torch.mm(x, weight.T, out=y)
                torch.mm(dy, weight, out=dx)

        return frozen, lambda: torch.autograd.grad(call(x), leaves, dys)

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

        return tuple(self.in_graph(function) / _TOKEN_LAYERS for function in (whole, frozen))

    def _layer(
        self, layer: Layer, alpha_t: float = 0.5
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Callable]:
        """Return x, every dy, what is differentiated, the weights, and a call. A and B are float32 beside 16 bits."""
        members = []
        for n, r in layer.members:
            base = nn.Linear(layer.k, n, bias=False, device=self.device, dtype=torch.bfloat16)
            member = AFALinear(base, r, backend=self.card.cuda)
            nn.init.normal_(member.lora_b)
            member.set_alpha_t(alpha_t)
            members.append(member)
        together = AFASharedInput(members) if len(members) > 1 else lambda x: (members[0](x),)
        x = half(self.card, layer.m, layer.k).requires_grad_()
        dys = [half(self.card, layer.m, n) for n, _ in layer.members]
        leaves = [x, *(p for member in members for p in (member.lora_a, member.lora_b))]
        return x, dys, leaves, [member.weight for member in members], together

    def in_graph(self, call: Callable[[], object]) -> float:
        """Return the seconds of one of many calls in a CUDA graph, in which the CPU is never waited for."""

        def repeated() -> tuple[Tensor, ...]:
            for _ in range(1 if self.card.small else _REPEATS):
                call()
            return ()

        with beside(self.device):
            call()
        wait(self.device)
        _, replay = in_graph(repeated, self.device)
        return seconds_of({"graph": replay}, self.card)["graph"] / (1 if self.card.small else _REPEATS)


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
