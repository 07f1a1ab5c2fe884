"""A small case, a row of results and the roofs of a machine, for the tests of the benchmarks."""

from bench.results import FIELDS
from bench.shapes import DTYPES, Case

TINY = Case(
    scope="layer",
    layer="tiny",
    m=40,
    k=24,
    n=56,
    r=4,
    bias=True,
    dtype="f32",
    adapter_dtype="f32",
    alpha_t=0.5,
    activation="silu",
    dropout=0.0,
    device="cpu",
)
ROOF = {"kind": "roof", "copy_gb_s": 10.0, "gemm_gflop_s": dict.fromkeys(DTYPES, 100.0)}


def example_row() -> dict:
    example = {str: "x", bool: True, int: 1, dict: {}, list: []}
    return {"kind": "row"} | {
        name: example[kind if isinstance(kind, type) else int] for name, kind in FIELDS["row"].items()
    }
