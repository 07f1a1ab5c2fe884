"""A row of the branch has the same bits whatever rows stand around it and wherever it stands: y, z and dx of some rows
in a call of their own are those of the large call.

The promise is for the branch, with dropout aside (its mask depends on the index of the row), and for calls of one
backend. ``torch`` and ``reference`` do not give it, since torch's GEMMs do not: with torch 2.13 (MKL, AVX-512), 300 x
520 by 520 x 16 in float32, nine tenths of the elements of z differ between a call of 1 to 15 rows and one of 300. Nor
do the frozen layer's GEMM and what follows from it.

Triton's interpreter multiplies with numpy, whose float32 GEMM depends on the size of the tile: there the 16-bit types
alone are compared, in which z is rounded. The compiled kernels of ``triton`` are compared on the PTX machine
(test_ptx_triton.py).
"""

import os

import pytest
import torch
from conftest import SIMULATED, device_of, skip_unless_available, skip_unless_taken
from helpers import DTYPES, run_on_isa

from afa_kernels.backend import choice, compiled, cpu
from afa_kernels.operator.options import Spec

pytestmark = pytest.mark.fast

FUSED = [name for name in choice.names() if name not in ("torch", "reference")]
ISAS = compiled._C.cpu_isas() if cpu.BACKEND.status() else []
# Around the rows that the kernels take at once (3 or 6), a block of them (48, 64), and the blocks of the backward.
COUNTS = (1, 2, 3, 4, 5, 6, 7, 16, 17, 47, 48, 49, 64, 65, 97, 193, 257)


class Branch:
    """One large problem on one backend, of which any rows can be computed alone."""

    def __init__(self, name, dtype, m, k, n, r, *, factors=None, activation="silu"):
        def draw(rows, cols, scale=1.0, to=dtype):
            return (torch.randn(rows, cols) * scale).to(device_of(name), to)

        self.backend, self.spec = choice.get(name), Spec(activation, 1.5)
        self.x, self.dy, self.base = draw(m, k), draw(m, n), draw(m, n)
        self.a, self.b = draw(r, k, k**-0.5, factors or dtype), draw(n, r, r**-0.5, factors or dtype)
        self.alpha_t = torch.tensor(0.3, device=self.x.device)

    def run(self, first, count):
        """Return y, z and dx of these rows, from a call that has no others."""
        x, dy, base = (t[first : first + count] for t in (self.x, self.dy, self.base))
        y = torch.empty_like(base)
        operands = (x, self.a, self.b)
        z = self.backend.forward(*operands, self.alpha_t, None, self.spec, base=base, out=y, save_z=True)
        dx, _, _ = self.backend.backward(
            dy, *operands, z, self.alpha_t, None, self.spec, need_dx=True, need_da=False, need_db=False
        )
        return y, z, dx

    def check(self, counts):
        rows = len(self.x)
        everything = self.run(0, rows)
        for count in counts:
            for first in sorted({0, (rows - count) // 2, rows - count}):
                for what, some, all_rows in zip(("y", "z", "dx"), self.run(first, count), everything, strict=True):
                    same = torch.equal(some, all_rows[first : first + count])
                    assert same, f"{what} of rows {first} to {first + count - 1} in {self.x.dtype}"


def check_cpu():
    """Every way through the CPU kernels; run in one process per instruction set."""
    torch.manual_seed(0)
    for dtype in DTYPES.values():
        for k, n, r, factors, activation in (
            (640, 512, 8, None, "silu"),  # whole tiles; A is read where it lies for a few rows
            (1100, 700, 20, torch.float32, "gelu"),  # tiles that are not whole, in several slabs
            (1100, 700, 33, None, "tanh"),  # a rank that is padded
        ):
            Branch("cpu", dtype, 400, k, n, r, factors=factors, activation=activation).check(COUNTS)
        # A result above the 12 MB from which every machine writes it past the cache.
        Branch("cpu", dtype, 2000, 3168, 3168, 4).check((1, 50, 100))


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_cpu_rows_have_the_same_bits_in_any_call(isa):
    run_on_isa(isa, "import test_row_invariance\ntest_row_invariance.check_cpu()")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in FUSED if name != "cpu"])
def test_gpu_rows_have_the_same_bits_in_any_call(name, dtype):
    skip_unless_available(name)
    skip_unless_taken(name, DTYPES[dtype])
    if (name, dtype) == ("triton", "f32") and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("numpy's float32 GEMM, not the kernel's")
    rows, counts = (70, (1, 17)) if name in SIMULATED else (400, COUNTS)
    for r in (16, 64):
        Branch(name, DTYPES[dtype], rows, 776, 584, r).check(counts)


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("name", ["cuda_ptx", "cuda"])
def test_cuda_rows_by_one_block_or_several(name, r):
    """Few rows have a block for each of the four segments of K; 48 tiles of rows have one that goes through all of
    them; and from 96 on it makes y too. Above rank 32 the sum over N has blocks as that over K has."""
    skip_unless_available(name)
    k, n = (776, 8) if r == 16 else (264, 520)
    Branch(name, torch.bfloat16, 96 * 64, k, n, r).check((100, 48 * 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [16, 64])
def test_triton_rows_by_one_program_or_several(r, dtype, monkeypatch):
    skip_unless_available("triton")
    skip_unless_taken("triton", DTYPES[dtype])
    from afa_kernels.backend.triton import launch

    branch = Branch("triton", DTYPES[dtype], 40, 776, 520, r)
    results = []
    for rows_of_a_full_device in (0, 1 << 30):
        monkeypatch.setattr(launch, "_FULL_DEVICE_ROWS", rows_of_a_full_device)
        results.append(branch.run(0, 40))
    for what, one, several in zip(("y", "z", "dx"), *results, strict=True):
        assert torch.equal(one, several), what


def test_a_segment_is_a_whole_number_of_tiles():
    skip_unless_available("triton")
    from afa_kernels.backend.triton import autotune, configs, launch

    for rows in configs.TABLE.values():
        for tiles in rows.values():
            for tile in autotune.candidates(tiles.project):
                for width in (1, 257, 5000):
                    assert launch.segment_columns(width) % tile.cols == 0
