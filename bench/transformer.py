"""A training step of a tiny transformer whose linear layers all carry an adapter."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import cost
from bench.memory import Memory, allocations, cuda_allocations, saved_bytes
from bench.problem import relative_error
from bench.providers import Provider
from bench.runner import Check
from bench.shapes import DTYPES, Case

_VOCABULARY = 1024
_HEADS = 6
_SEQUENCE = 256
_LAYERS = 4
HIDDEN, INTERMEDIATE = 384, 1024


class Block(nn.Module):
    def __init__(self, hidden: int, intermediate: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        normed = self.attention_norm(x)
        q, k, v = (
            projection(normed).view(batch, sequence, self.heads, -1).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, sequence, hidden))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Transformer(nn.Module):
    """Embedding, blocks and head, all frozen but the norms: with those trained, the frozen model's
    backward passes through every layer too, and the adapters' cost is all that differs."""

    def __init__(self, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block(HIDDEN, INTERMEDIATE, _HEADS) for _ in range(layers))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, _VOCABULARY, bias=False)
        for module in self.modules():
            module.requires_grad_(isinstance(module, nn.RMSNorm))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def linears(self) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
        """Yield each adapted layer with its block and its name there."""
        for block in self.blocks:
            for name, module in list(block.named_children()):
                if isinstance(module, nn.Linear):
                    yield block, name, module


class Step:
    """A model with one provider's adapters, its optimizer and one batch."""

    def __init__(self, provider: Provider, case: Case, layers: int = _LAYERS, *, wide: bool = False):
        """``wide`` computes in float64, with weights that were rounded to the dtypes of the
        case."""
        self._cost = cost.frozen if provider.function == "frozen" else cost.whole
        generator = torch.Generator().manual_seed(0)
        self.model = Transformer(layers)
        for p in self.model.parameters():
            if p.dim() == 2:
                p.data.normal_(generator=generator).mul_(p.shape[1] ** -0.5)
        dtype, adapter_dtype = DTYPES[case.dtype], DTYPES[case.adapter_dtype]
        self.model.to(device=case.device, dtype=dtype)
        self.adapters: list[nn.Parameter] = []
        self.linear_cases: list[Case] = []
        for block, name, linear in self.model.linears():
            n, k = linear.weight.shape
            a = torch.randn(case.r, k, generator=generator) * k**-0.5
            # Small beside the frozen weight, as in training, so that the loss stays tame.
            b = torch.randn(n, case.r, generator=generator) * 0.1 * case.r**-0.5
            a, b = (t.to(device=case.device, dtype=adapter_dtype) for t in (a, b))
            of_layer = case._replace(scope="layer", k=k, n=n)
            module, adapter = provider.layer(linear, a, b, of_layer)
            setattr(block, name, module)
            self.adapters.extend(adapter)
            self.linear_cases.append(of_layer)
        if wide:
            self.model.to(torch.float64)
        sequence = math.gcd(case.m, _SEQUENCE)
        tokens = torch.randint(_VOCABULARY, (case.m // sequence, sequence + 1), generator=generator)
        self.tokens = tokens.to(case.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def loss(self) -> Tensor:
        logits = self.model(self.tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten())

    def __call__(self, _: object = None) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def results(self) -> dict[str, Tensor]:
        """Return the logits of the first sequence, and the gradients of all A and B as one."""
        logits = self.model(self.tokens[:1, :-1])
        if not self.adapters:
            return {"logits": logits.detach()}
        weight = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
        gradients = torch.autograd.grad((logits * weight.to(logits.dtype)).sum(), self.adapters)
        return {"logits": logits.detach(), "adapters": torch.cat([g.flatten() for g in gradients])}

    def memory(self) -> Memory:
        on_gpu = self.tokens.is_cuda
        self()  # the optimizer allocates its state in the first step
        peak, allocated = (cuda_allocations if on_gpu else allocations)(self)
        return Memory(peak, allocated, saved_bytes(self.loss, self.model.parameters()))

    def least(self) -> cost.Cost:
        """Return the least cost of the adapted layers, forward and backward."""
        return sum((self._cost(case, "both") for case in self.linear_cases), cost.Cost(0, 0))


class Checker:
    """Compares a model's logits and adapter gradients with float64, beside plain torch in the same
    dtype."""

    def __init__(self, eager: Provider, case: Case):
        self._eager, self._case = eager, case
        self._references: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def _reference(self, function: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if function not in self._references:
            case = self._case._replace(alpha_t=self._case.alpha_t if function == "afa" else 0.0)
            self._references[function] = (
                Step(self._eager, case, wide=True).results(),
                Step(self._eager, case).results(),
            )
        return self._references[function]

    def check(self, step: Step, function: str) -> Check:
        if function == "frozen":
            return Check(0.0, 1.0, True)  # no adapter: this is torch itself
        expected, same = self._reference(function)
        got = step.results()
        dtype = self._case.dtype
        rounding = torch.finfo(DTYPES[dtype]).eps * (64.0 if dtype == "f64" else 0.5)
        errors = {name: relative_error(got[name], expected[name]) for name in expected}
        allowed = {name: relative_error(same[name], expected[name]) for name in expected}
        return Check(
            max(errors.values()),
            max(error / max(allowed[name], rounding) for name, error in errors.items()),
            all(error <= 2 * allowed[name] + rounding for name, error in errors.items()),
        )
