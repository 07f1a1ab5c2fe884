"""What the benchmarks under pytest share (test_*.py here): their cases, and skips with the provider's reason."""

import pytest

from bench.providers import Provider, providers
from bench.shapes import LAYERS, Case

NAMES = ("frozen", "eager", "afa", "afa.torch", "afa.cpu", "afa.triton", "afa.cuda")
ROUNDS = 15
WARMUP_ROUNDS = 2


def case(scope: str, layer: str, m: int, r: int, dtype: str, alpha_t: float = 0.5) -> Case:
    linear = LAYERS[layer]
    return Case(
        scope=scope,
        layer=layer,
        m=m,
        k=linear.k,
        n=linear.n,
        r=r,
        bias=linear.bias,
        dtype=dtype,
        adapter_dtype=dtype,
        alpha_t=alpha_t,
        activation="silu",
        dropout=0.0,
        device="cpu",
    )


def provider_or_skip(name: str, wanted: Case) -> Provider:
    known = providers()
    if name not in known:
        pytest.skip(f"{name}: not registered")
    reason = known[name].absent(wanted)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return known[name]
