"""Which cases a run has: the product of the flags' axes, or a preset of such products."""

import argparse
from collections.abc import Iterator
from itertools import product

from bench.shapes import DEFAULT_SHAPES, EXPERTS, Case, shapes

# Each preset is a list of products; what a product leaves out comes from BASE.
BASE = {
    "scopes": ["layer"],
    "shapes": None,  # those that the scope has by default
    "tokens": [2048],
    "ranks": [16],
    "dtypes": ["f32"],
    "alphas": [0.5],
}
# The shapes for which the cpu kernels have goals (goals.py): training, and decoding.
_BOTH = {"scopes": ["layer", "branch"], "dtypes": ["f32", "bf16"]}
_GOALS = [
    {**_BOTH, "shapes": ["plain.square"]},
    {**_BOTH, "shapes": ["plain.wide"], "tokens": [4096]},
    {**_BOTH, "shapes": ["plain.deep"], "tokens": [512], "ranks": [64]},
]
_DECODE = [{**_BOTH, "shapes": ["plain.deep"], "tokens": [1, 4, 16]}]
_STEP = [
    {"scopes": ["model"], "shapes": ["llama-block"], "tokens": [512], "dtypes": ["f32", "bf16"], "alphas": [0.5, 0.0]}
]
PRESETS: dict[str, list[dict[str, list]]] = {
    # Every scope and every kind of result within two minutes on two slow cores.
    "quick": [
        {"scopes": ["layer", "branch"], "shapes": ["gpt2.up"], "tokens": [512]},
        {"shapes": ["minilm.attention"], "tokens": [512], "alphas": [1.0, 0.0]},
        {"shapes": ["minilm.attention"], "tokens": [512], "dtypes": ["bf16", "f16", "f64"]},
        {"scopes": ["layer", "branch"], "shapes": ["plain.square"], "tokens": [1, 16]},
        {"scopes": ["model"], "shapes": ["tiny-transformer"], "tokens": [32]},
    ],
    # What a user sees: a training step of a model.
    "step": _STEP,
    "goals": _GOALS,
    "decode": _DECODE,
    "standard": [
        *_GOALS,
        *_DECODE,
        {"shapes": ["minilm", "gpt2"], "tokens": [2048], "ranks": [8], "dtypes": ["f32"]},
        {"shapes": ["gpt2.up"], "tokens": [256], "dtypes": ["f16"]},
        {"shapes": ["gpt2.up"], "alphas": [1.0, 0.0], "dtypes": ["f32"]},
        {**_STEP[0], "alphas": [0.5]},
    ],
    # Experts: two models, each with even and with skewed routing, and the picture of the tax against their number.
    "experts": [
        {"scopes": ["experts"], "shapes": [name + routing for name in EXPERTS for routing in ("", ".skewed")]},
        {"scopes": ["experts"], "shapes": [f"{n}x1024x1024{r}" for r in ("", ".skewed") for n in (8, 16, 32, 64)]},
    ],
    # The two pictures of the adapter tax.
    "tokens": [{"shapes": ["plain.wide"], "tokens": [256, 512, 1024, 2048, 4096]}],
    "ranks": [{"shapes": ["plain.square"], "ranks": [8, 16, 32, 64, 128]}],
}


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases in the order in which they run, each once."""
    axes = {name: getattr(arguments, name) for name in BASE}
    given = {name: values for name, values in axes.items() if values is not None}
    products = [BASE] if given and arguments.preset is None else PRESETS[arguments.preset or "standard"]
    found = []
    for preset in products:
        found.extend(_product({**BASE, **preset, **given}, arguments))
    return list(dict.fromkeys(found))


def _product(axes: dict[str, list], arguments: argparse.Namespace) -> Iterator[Case]:
    for scope, tokens, r, dtype, alpha_t in product(
        axes["scopes"], axes["tokens"], axes["ranks"], axes["dtypes"], axes["alphas"]
    ):
        if scope not in DEFAULT_SHAPES:
            raise ValueError(f"--scopes: expected some of {', '.join(DEFAULT_SHAPES)}, got {scope!r}")
        for shape in shapes(scope, axes["shapes"]):
            yield Case(
                scope,
                shape.name,
                m=tokens,
                k=shape.k,
                n=shape.n,
                r=r,
                bias=shape.bias,
                dtype=dtype,
                adapter_dtype=arguments.adapter_dtype or dtype,
                alpha_t=alpha_t,
                activation=arguments.activation,
                dropout=arguments.dropout,
                device=arguments.device,
            )
