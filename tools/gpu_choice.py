"""The step of gpu_check that asks whether the backend that a call gets is the fastest one on the card.

Which one it gets follows from device, dtype and rank. Shapes lie on both sides of where the rule changes its mind.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

import afa_kernels as afa
from tools.gpu_figures import medians
from tools.gpu_steps import Context, Layer, Outcome, Step

K, N = 4096, 4096
SHAPES = (
    (1, 16), (1, 128), (64, 128), (2048, 64), (2048, 128), (8192, 64), (8192, 128), (16384, 128),
    (32768, 32), (32768, 64),
)  # fmt: skip
_GRAPHED_ROWS = 2048  # up to here calls are replayed from a CUDA graph, or the host's time would be compared
_MARGIN = 0.05  # of a step of the layer, that the chosen backend may take longer than the fastest


class Measured(NamedTuple):
    m: int
    r: int
    chosen: str
    times: dict[str, float]  # of a training step of the layer, by backend

    @property
    def behind(self) -> float:
        return self.times[self.chosen] / min(self.times.values()) - 1

    @property
    def row(self) -> dict[str, object]:
        taken = {name: round(ms, 4) for name, ms in self.times.items()}
        return {"M": self.m, "r": self.r, **taken, "chosen": self.chosen, "behind the fastest": f"{self.behind:.1%}"}


def outcome_of(measured: list[Measured]) -> Outcome:
    wrong = [each for each in measured if each.behind > _MARGIN]
    told = f"the chosen backend is the fastest, or within {_MARGIN:.0%} of it, in {len(measured) - len(wrong)} of "
    return Outcome("failed" if wrong else "ok", f"{told}{len(measured)} shapes", [each.row for each in measured])


def measure_choice(context: Context) -> Outcome:
    if context.device != "cuda":
        return Outcome.absent("which backend is the fastest on a GPU needs one")
    return outcome_of([_measure(m, r, context) for m, r in SHAPES])


def _measure(m: int, r: int, context: Context) -> Measured:
    layer = Layer.random((m, K, N, r), context.device)
    layer = replace(layer, a=layer.a.float(), b=layer.b.float())
    steps = {}
    for backend in ("torch", *context.backends):

        def step(backend=backend, layer=layer) -> None:
            layer.step(backend, dropout_p=0.0)

        for _ in range(3):
            step()
        steps[backend] = step
        if m <= _GRAPHED_ROWS:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            steps[backend] = graph.replay
    chosen = afa.plan(layer.x, layer.a, layer.b, layer.alpha_t).backend
    return Measured(m, r, chosen, medians(steps, context))


STEPS = (Step("choice", "is the backend that a call gets the fastest on this card?", measure_choice),)
