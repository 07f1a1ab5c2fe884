"""The native CPU kernels on raw operands, and how accurate their results have to be."""

import torch

from afa_kernels.backend import compiled, cpu
from afa_kernels.backend import torch as torch_ops
from afa_kernels.operator import reference
from afa_kernels.operator.activation import ACTIVATIONS
from afa_kernels.operator.options import Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = compiled._C.cpu_isas() if cpu.BACKEND.status() else []
NAN = float("nan")


def problem(m, k, n, r, dtype, *, ab_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, cols, scale=1.0):
        return torch.randn(rows, cols, generator=generator) * scale

    x, dy, base = (draw(m, c).to(dtype) for c in (k, n, n))
    a = draw(r, k, k**-0.5).to(ab_dtype or dtype)
    b = draw(n, r, r**-0.5).to(ab_dtype or dtype)
    return x, a, b, dy, base


def run(x, a, b, dy, base, spec, *, alpha_t=0.3, seed=None, threads=2, backend=cpu.BACKEND):
    """Return y, z, dx, da, db; the output is poisoned first."""
    alpha_t = torch.tensor(alpha_t)
    out = torch.full((x.shape[0], b.shape[0]), NAN, dtype=x.dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        z = backend.forward(x, a, b, alpha_t, seed, spec, base=base, out=out, save_z=True)
        gradients = backend.backward(
            dy, x, a, b, z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=True
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return out, z, *gradients


def truth_of(x, a, b, dy, base, spec, *, alpha_t=0.3, seed=None):
    alpha_t = torch.tensor(alpha_t)
    x64, a64, b64 = x.double(), a.to(x.dtype).double(), b.to(x.dtype).double()
    base64 = None if base is None else base.double()
    y, z = reference.forward(x64, a64, b64, alpha_t, seed, spec, base64)
    return y, z, *reference.backward(dy.double(), x64, a64, b64, alpha_t, seed, spec)


def assert_accurate(got, same_dtype, truth, dtype, context=""):
    """No further from float64 than twice what torch in the dtype of x is, plus a rounding of the largest value."""
    for name, value, torch_value, exact in zip(("y", "z", "dx", "da", "db"), got, same_dtype, truth, strict=True):
        assert value.shape == exact.shape and value.dtype == torch_value.dtype, (name, context)
        assert torch.isfinite(value).all(), (name, context)
        floor = torch.finfo(dtype).eps * exact.abs().max().item()
        error = (value.double() - exact).abs().max().item()
        allowed = 2 * (torch_value.double() - exact).abs().max().item() + 2 * floor
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} {context}"


def check(operands, spec, **options):
    got = run(*operands, spec, **options)
    eager = run(*operands, spec, **options, backend=torch_ops.BACKEND)
    options = {key: value for key, value in options.items() if key in ("alpha_t", "seed")}
    assert_accurate(got, eager, truth_of(*operands, spec, **options), operands[0].dtype, (spec, options))


SHAPES = (
    (1, 70, 90, 4),  # one row: slabs of columns
    (5, 1030, 1100, 24),  # few rows, several slabs, tiles that are not whole; still worth several threads
    (48, 64, 64, 8),  # exactly one block of rows and whole tiles
    (49, 100, 129, 7),  # one row more than a block; odd rank
    (390, 70, 66, 33),  # more rows than a super block
    (19, 130, 140, 256),  # the largest rank
    (6, 640, 130, 20),  # so few rows that A is read where it lies
    (33, 17, 19, 1),  # the smallest rank
)


def accuracy_of_every_shape():
    """Every shape, dtype and activation once: run in this process, and in one process per instruction set."""
    for index, (m, k, n, r) in enumerate(SHAPES):
        for dtype in DTYPES:
            activation = list(ACTIVATIONS)[index % len(ACTIVATIONS)]
            operands = problem(m, k, n, r, dtype, ab_dtype=(None, torch.float32, torch.float64)[index % 3])
            check(operands, Spec(activation, 1.7))
            check(operands, Spec(activation, 0.5, 77), seed=torch.tensor(-12345 - index))
    # Results above the 12 MB from which every machine writes them past the cache; rows end within a tile.
    for dtype in DTYPES:
        check(problem(2000, 3168, 3168, 4, dtype), Spec("silu", 1.7))


def results_that_bypass_the_cache():
    """y and dx of more bytes than kMost of csrc/cpu/isa/target.h have the bits of those of a few rows, which do not."""
    m, sizes, spec = 3300, 2048, Spec("silu", 1.0)
    for dtype in DTYPES:
        x, a, b, dy, _ = problem(m, sizes, sizes, 4, dtype)
        x[5, 3], x[7, 3], dy[5, 3], dy[7, 3] = NAN, torch.finfo(dtype).max, NAN, torch.finfo(dtype).max

        def results(rows, x=x, a=a, b=b, dy=dy):
            y, z, dx, *_ = run(x[rows], a, b, dy[rows], None, spec)
            return y, z, dx

        whole = results(slice(0, m))
        assert whole[0].nbytes > 12 << 20
        for rows in (slice(0, 50), slice(m - 50, m)):
            for name, large, small in zip(("y", "z", "dx"), whole, results(rows), strict=True):
                part = large[rows]
                assert torch.equal(part.isnan(), small.isnan()), (name, dtype)
                assert torch.equal(part.nan_to_num(), small.nan_to_num()), (name, dtype)
        assert whole[0][5].isnan().all() and not whole[0][6].isnan().any(), dtype
