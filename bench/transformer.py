"""Forward and backward of a stack of transformer blocks whose linear layers all carry an adapter."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import cost
from bench.memory import Memory, memory_of
from bench.problem import relative_error
from bench.providers import Provider, providers
from bench.runner import Check, compared
from bench.shapes import DTYPES, Case, Transformer, transformer
from bench.whole_models import Weights

_SEQUENCE = 256


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        q, k, v = (
            projection(x).view(batch, sequence, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, sequence, hidden))


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A block of Llama without the rotary embedding, which no adapter changes."""

    def __init__(self, hidden: int, intermediate: int, heads: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention, self.mlp = Attention(hidden, heads), MLP(hidden, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


@dataclass
class Operands:
    """The frozen weights of a model, A and B of each of its linear layers, x and dy: the same for all providers."""

    model: Transformer
    frozen: dict[str, Tensor]
    adapters: Weights
    x: Tensor
    dy: Tensor

    @staticmethod
    def of(model: Transformer, case: Case) -> "Operands":
        generator = torch.Generator(device=case.device).manual_seed(0)
        dtype, adapter_dtype = DTYPES[case.dtype], DTYPES[case.adapter_dtype]

        def draw(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=case.device).mul_(scale).to(to)

        frozen, adapters = {}, {}
        for name, (n, k) in model.linears().items():
            frozen[f"{name}.weight"] = draw(n, k, scale=k**-0.5)
            a = draw(case.r, k, scale=k**-0.5, to=adapter_dtype)
            # Small beside the frozen weight, as in training.
            adapters[name] = a, draw(n, case.r, scale=0.1 * case.r**-0.5, to=adapter_dtype)
        sequence = math.gcd(case.m, _SEQUENCE)
        shape = (case.m // sequence, sequence, model.hidden)
        return Operands(model, frozen, adapters, draw(*shape), draw(*shape))

    def wide(self) -> "Operands":
        """Return the same in float64. A and B are rounded to the dtype of x first, as autocast does."""

        def widen(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(value.to(self.x.dtype).to(torch.float64) for value in values)

        frozen = dict(zip(self.frozen, widen(tuple(self.frozen.values())), strict=True))
        adapters = {name: widen(weights) for name, weights in self.adapters.items()}
        return Operands(self.model, frozen, adapters, *widen((self.x, self.dy)))


class Step:
    """A model with one provider's adapters: forward and backward, which leave the gradients in the parameters."""

    def __init__(self, provider: Provider, case: Case, operands: Operands):
        model = operands.model
        cost_of = cost.frozen if provider.function == "frozen" else cost.whole
        layers = [case._replace(scope="layer", k=k, n=n) for n, k in model.linears().values()]
        self._cost = {
            step: sum((cost_of(layer, step) for layer in layers), cost.Cost(0, 0))
            for step in ("forward", "backward", "both")
        }
        with torch.device("meta"):
            blocks = [Block(model.hidden, model.intermediate, model.heads) for _ in range(model.blocks)]
        self.model = nn.Sequential(*blocks)
        norms = {
            name: torch.ones(p.shape, dtype=operands.x.dtype, device=operands.x.device)
            for name, p in self.model.named_parameters()
            if name not in operands.frozen
        }
        # Assigned, so that all providers multiply by the same memory.
        self.model.load_state_dict(operands.frozen | norms, assign=True)
        self.model.requires_grad_(False)
        self.frozen = list(self.model.parameters())
        adapters = {name: (a.clone(), b.clone()) for name, (a, b) in operands.adapters.items()}
        self.adapters = provider.adapt(self.model, adapters, case)
        # With a gradient of x the frozen model's backward passes through every layer too.
        self.x, self.dy = operands.x.clone().requires_grad_(), operands.dy

    def prepare(self) -> None:
        for p in (self.x, *self.adapters):
            p.grad = None

    def forward(self, _: object = None) -> Tensor:
        return self.model(self.x)

    def backward(self, y: Tensor) -> Tensor:
        y.backward(self.dy)
        return y  # handed on, so that it is not freed within this step's time

    def __call__(self, _: object = None) -> None:
        self.prepare()
        self.backward(self.forward())

    def results(self) -> dict[str, Tensor]:
        """Return y, dx, and the gradients of all A as one and of all B as one."""
        self.prepare()
        y = self.backward(self.forward()).detach()
        gradients = [p.grad.flatten() for p in self.adapters]
        ab = {"da": torch.cat(gradients[::2]), "db": torch.cat(gradients[1::2])} if gradients else {}
        return {"y": y, "dx": self.x.grad, **ab}

    def memory(self) -> Memory:
        operands = (self.x, self.dy, *self.adapters, *self.frozen)
        self.prepare()
        return memory_of(self.forward, lambda: self.backward(self.forward()), operands, str(self.x.device))

    def least(self, step: str) -> cost.Cost:
        """Return the least cost of the adapted layers in "forward", "backward" or "both"."""
        return self._cost[step]


def checking(case: Case) -> Callable[[Provider], tuple[Step, Check]]:
    """Return what makes the step of a provider and compares its output and gradients with float64, beside plain torch
    in the same dtype."""
    operands = Operands.of(transformer(case.layer), case)
    wide, known = operands.wide(), providers()
    # A mask is random and differs between providers: accuracy is that of the call without it.
    plain = case._replace(dropout=0.0)

    @cache
    def reference(function: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        at = plain._replace(alpha_t=case.alpha_t if function == "afa" else 0.0)
        provider = known["frozen" if function == "frozen" else "eager"]
        expected, same = (Step(provider, at, each).results() for each in (wide, operands))
        return expected, {name: relative_error(same[name], value) for name, value in expected.items()}

    def checked(provider: Provider) -> tuple[Step, Check]:
        step = Step(provider, case, operands)
        unmasked = Step(provider, plain, operands) if case.dropout else step
        return step, compared(unmasked.results(), *reference(provider.function), operands.x.dtype)

    return checked
