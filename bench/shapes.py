"""The named shapes: the linear layers of five models, stacks of transformer blocks, the token counts and the ranks."""

import math
from typing import NamedTuple

import torch

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Linear(NamedTuple):
    """One frozen layer: ``weight (n, k)``, with a bias or without."""

    name: str
    k: int
    n: int
    bias: bool


MODELS: dict[str, tuple[Linear, ...]] = {
    "minilm": (
        Linear("minilm.attention", 384, 384, True),
        Linear("minilm.up", 384, 1536, True),
        Linear("minilm.down", 1536, 384, True),
    ),
    "gpt2": (
        Linear("gpt2.qkv", 768, 2304, True),
        Linear("gpt2.out", 768, 768, True),
        Linear("gpt2.up", 768, 3072, True),
        Linear("gpt2.down", 3072, 768, True),
    ),
    "llama-3.2-1b": (
        Linear("llama-3.2-1b.qo", 2048, 2048, False),
        Linear("llama-3.2-1b.kv", 2048, 512, False),
        Linear("llama-3.2-1b.up", 2048, 8192, False),
        Linear("llama-3.2-1b.down", 8192, 2048, False),
    ),
    "llama-3-8b": (
        Linear("llama-3-8b.qo", 4096, 4096, False),
        Linear("llama-3-8b.kv", 4096, 1024, False),
        Linear("llama-3-8b.up", 4096, 14336, False),
        Linear("llama-3-8b.down", 14336, 4096, False),
    ),
    "qwen2.5-7b": (
        Linear("qwen2.5-7b.q", 3584, 3584, True),
        Linear("qwen2.5-7b.kv", 3584, 512, True),
        Linear("qwen2.5-7b.o", 3584, 3584, False),
        Linear("qwen2.5-7b.up", 3584, 18944, False),
        Linear("qwen2.5-7b.down", 18944, 3584, False),
    ),
    # Not of any model: near square, wide and deep, small enough for a laptop.
    "plain": (
        Linear("plain.square", 2048, 2048, False),
        Linear("plain.wide", 1024, 4096, False),
        Linear("plain.deep", 4096, 4096, False),
    ),
}
LAYERS: dict[str, Linear] = {layer.name: layer for model in MODELS.values() for layer in model}


class Transformer(NamedTuple):
    """Blocks as Llama has them, without embedding and head: what the scope "model" measures."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (N, K) of each linear layer by its name in the model."""
        square, up, down = (
            (self.hidden, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )
        attention = {f"attention.{name}_proj": square for name in "qkvo"}
        mlp = {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
        return {f"{i}.{name}": shape for i in range(self.blocks) for name, shape in (attention | mlp).items()}


TRANSFORMERS: dict[str, Transformer] = {
    model.name: model
    for model in (
        Transformer("tiny-transformer", 4, 384, 1024, 6),
        Transformer("llama-block", 1, 1024, 2816, 8),
        Transformer("llama-8-blocks", 8, 1024, 2816, 8),  # over a hundred adapter weights, for the optimizer
    )
}


class Experts(NamedTuple):
    """The experts of one layer of a mixture: ``weight (count, n, k)``. What the scope "experts" measures."""

    name: str
    count: int
    k: int
    n: int

    @property
    def is_skewed(self) -> bool:
        return self.name.endswith(_SKEWED)

    def rows(self, m: int) -> list[int]:
        """Return how many of m rows each expert gets: equally many, or in the ratios 1, 1/2, 1/3, .. where the name
        ends in ".skewed"."""
        shares = [1 / (i + 1) if self.is_skewed else 1.0 for i in range(self.count)]
        ends = [round(m * sum(shares[: i + 1]) / sum(shares)) for i in range(self.count)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


_SKEWED = ".skewed"
# Of Qwen3-30B-A3B, half as wide and with half of the experts, and of Mixtral-8x7B, a quarter as wide: so that two cores
# take them.
EXPERTS: dict[str, Experts] = {
    shape.name: shape
    for shape in (
        Experts("qwen3.gate_up", 64, 1024, 768),
        Experts("qwen3.down", 64, 384, 1024),
        Experts("mixtral.gate_up", 8, 1024, 7168),
        Experts("mixtral.down", 8, 3584, 1024),
    )
}
_HEAD = 128  # features of a head, in a model that is given by its sizes
DEFAULT_SHAPES = {
    "layer": ["plain.square"],
    "branch": ["plain.square"],
    "model": ["llama-block"],
    "experts": ["64x1024x1024", "64x1024x1024.skewed"],
}


class Case(NamedTuple):
    """One measured problem; its fields are the key of a row."""

    scope: str  # "branch": afa_lora into a given base; "layer": with its frozen GEMM; "model"; "experts": experts
    layer: str  # or the model, of which k and n are the hidden and the intermediate size; or the experts
    m: int
    k: int
    n: int
    r: int
    bias: bool
    dtype: str
    adapter_dtype: str
    alpha_t: float
    activation: str
    dropout: float
    device: str

    def nbytes(self) -> int:
        """Return a bound on the memory that measuring this case takes: operands, base and its copy,
        output, gradients and a peer's three float32 temporaries."""
        size = DTYPES[self.dtype].itemsize
        if self.scope == "experts":  # the truth in float64, or PEFT's weights of all experts with their gradients
            return experts(self.layer).count * self.n * self.k * (5 * size + 8) + 64 * self.m * (self.k + self.n)
        return size * (4 * self.m * self.k + 6 * self.m * self.n + 2 * self.n * self.k) + 12 * (
            self.m * max(self.k, self.n)
        )


def layers(names: list[str]) -> list[Linear]:
    """Return the layers that ``names`` give: a layer ("gpt2.up"), a model ("gpt2") or "KxN".

    Raises:
        ValueError: a name is none of these; the message lists the known ones.
    """
    found = []
    for name in names:
        sizes = _sizes(name)
        if name in LAYERS:
            found.append(LAYERS[name])
        elif name in MODELS:
            found.extend(MODELS[name])
        elif sizes:
            found.append(Linear(name, *sizes, False))
        else:
            raise ValueError(
                f"shapes: expected KxN, a model ({', '.join(MODELS)}) or a layer ({', '.join(LAYERS)}), got {name!r}"
            )
    return list(dict.fromkeys(found))


def transformer(name: str) -> Transformer:
    """Return the model ``name``: one of :data:`TRANSFORMERS`, or "KxN" for one block of hidden size K and intermediate
    size N.

    Raises:
        ValueError: it is none of these; the message lists the known ones.
    """
    if name in TRANSFORMERS:
        return TRANSFORMERS[name]
    sizes = _sizes(name)
    if not sizes:
        raise ValueError(f"shapes: expected KxN or a model of {', '.join(TRANSFORMERS)} in scope model, got {name!r}")
    hidden, intermediate = sizes
    return Transformer(name, 1, hidden, intermediate, math.gcd(hidden, max(1, hidden // _HEAD)))


def experts(name: str) -> Experts:
    """Return the experts ``name``: of :data:`EXPERTS`, or "ExKxN" for E of them; either may end in ".skewed".

    Raises:
        ValueError: it is neither; the message lists the known ones.
    """
    plain = name.removesuffix(_SKEWED)
    if plain in EXPERTS:
        return EXPERTS[plain]._replace(name=name)
    count, _, sizes = plain.partition("x")
    found = _sizes(sizes)
    if not count.isdigit() or not int(count) or not found:
        raise ValueError(
            f"shapes: expected ExKxN or some of {', '.join(EXPERTS)} in scope experts, with or without {_SKEWED!r} "
            f"behind it, got {name!r}"
        )
    return Experts(name, int(count), *found)


def shapes(scope: str, names: list[str] | None) -> list[Linear]:
    """Return the layers that ``names`` give in ``scope``, or the models, with their two sizes; the scope's default for
    None.

    Raises:
        ValueError: a name is unknown there.
    """
    names = names or DEFAULT_SHAPES[scope]
    if scope == "experts":
        return [Linear(shape.name, shape.k, shape.n, False) for shape in map(experts, dict.fromkeys(names))]
    if scope != "model":
        return layers(names)
    models = map(transformer, dict.fromkeys(names))
    return [Linear(model.name, model.hidden, model.intermediate, False) for model in models]


def _sizes(name: str) -> tuple[int, int] | None:
    """Return the sizes of "KxN"; None for another name."""
    k, x, n = name.partition("x")
    if x and k.isdigit() and n.isdigit() and int(k) and int(n):
        return int(k), int(n)
    return None
