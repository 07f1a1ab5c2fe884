"""The named shapes: the linear layers of five models, the token counts and the ranks."""

from typing import NamedTuple

import torch

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
DECODE_TOKENS = (1, 2, 4, 8, 16)
TRAINING_TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
RANKS = (8, 16, 32, 64, 128)
ALPHAS = (1.0, 0.5, 0.0)


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


class Case(NamedTuple):
    """One measured problem; its fields are the key of a row."""

    scope: str  # "branch": afa_lora into a given base; "layer": with its frozen GEMM; "model"
    layer: str
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
        k, x, n = name.partition("x")
        if name in LAYERS:
            found.append(LAYERS[name])
        elif name in MODELS:
            found.extend(MODELS[name])
        elif x and k.isdigit() and n.isdigit() and int(k) and int(n):
            found.append(Linear(name, int(k), int(n), False))
        else:
            raise ValueError(
                f"shapes: expected KxN, a model ({', '.join(MODELS)}) or a layer ({', '.join(LAYERS)}), got {name!r}"
            )
    return list(dict.fromkeys(found))
