"""What the native CPU kernels read and write: strides, expanded operands, the output in a larger tensor, threads."""

import pytest
import torch
from conftest import skip_without_memory
from native_helpers import DTYPES, NAN, SHAPES, problem, run

from afa_kernels.backend import compiled, cpu
from afa_kernels.operator.options import Spec

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not cpu.BACKEND.status(), reason=cpu.BACKEND.status().reason),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_threads_or_on_saved_z(shape, dtype):
    operands = problem(*shape, dtype, ab_dtype=torch.float32)
    spec, seed = Spec("gelu", 2.0, 26), torch.tensor(99)
    first = run(*operands, spec, seed=seed, threads=1)
    for threads in (2, 3, 5):
        for _ in range(2):
            again = run(*operands, spec, seed=seed, threads=threads)
            for one, other in zip(first, again, strict=True):
                assert torch.equal(one, other), threads


def strided(t, kind):
    """The same values with other strides, and NaN in every gap."""
    if kind == "transposed":
        return t.T.contiguous().T
    rows, cols = (2 * t.shape[0], 3 * t.shape[1]) if kind == "gaps" else (t.shape[0], t.shape[1] + 5)
    memory = torch.full((rows, cols), NAN, dtype=t.dtype)
    view = memory[::2, ::3] if kind == "gaps" else memory[:, 2:-3]
    return view.copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["transposed", "gaps", "window"])
def test_strides_change_nothing(kind, dtype):
    for m, k, r in ((3, 130, 6), (3, 640, 8), (70, 130, 6)):
        operands = problem(m, k, 75, r, dtype)
        plain = run(*operands, Spec("silu", 1.5, 30), seed=torch.tensor(4))
        copies = [strided(t, kind) for t in operands]
        kept = [t.clone() for t in copies]
        for one, other in zip(plain, run(*copies, Spec("silu", 1.5, 30), seed=torch.tensor(4)), strict=True):
            assert torch.equal(one, other)
        for before, after in zip(kept, copies, strict=True):
            assert torch.equal(before, after), "an operand was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "transposed", "gaps", "window"])
def test_base_is_read_and_out_alone_is_written(kind, dtype):
    x, a, b, _, base = problem(50, 40, 75, 6, dtype)
    spec, alpha_t = Spec("relu", 1.0), torch.tensor(0.5)

    def forward(base, out):
        cpu.BACKEND.forward(x, a, b, alpha_t, None, spec, base=base, out=out, save_z=False)
        return out

    expected = forward(base, torch.full_like(base, NAN))
    place = base.clone() if kind == "plain" else strided(base, kind)
    memory = place if kind in ("plain", "transposed") else place._base
    gaps = memory.isnan()
    assert torch.equal(forward(place, place), expected)
    assert torch.equal(memory.isnan(), gaps), "something beside out was written"
    bias = base[0].expand_as(base)
    zero = forward(None, torch.full_like(base, NAN))
    assert torch.equal(forward(torch.zeros_like(base), torch.full_like(base, NAN)), zero)
    assert torch.equal(forward(bias, torch.full_like(base, NAN)), forward(bias.contiguous(), torch.empty_like(base)))


def test_expanded_dy():
    x, a, b, dy, base = problem(70, 64, 96, 8, torch.float32)
    for expanded in (dy[:1].expand_as(dy), torch.ones(()).expand_as(dy)):
        operands = (x, a, b, expanded, base)
        dense = (x, a, b, expanded.contiguous(), base)
        for one, other in zip(run(*operands, Spec("tanh", 1.0)), run(*dense, Spec("tanh", 1.0)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_subset_of_gradients_has_the_same_bits(dtype):
    x, a, b, dy, base = problem(100, 80, 70, 5, dtype)
    spec, alpha_t = Spec("gelu_tanh", 1.2), torch.tensor(0.7)
    full = run(x, a, b, dy, base, spec, alpha_t=0.7)
    for subset in range(1, 8):
        needs = [bool(subset & bit) for bit in (1, 2, 4)]
        needed_ones = dict(zip(("need_dx", "need_da", "need_db"), needs, strict=True))
        got = cpu.BACKEND.backward(dy, x, a, b, full[1], alpha_t, None, spec, **needed_ones)
        for needed, one, other in zip(needs, got, full[2:], strict=True):
            assert torch.equal(one, other) if needed else one is None


def test_db_alone_over_many_blocks_of_rows():
    """Without dz a block of rows ends with dB: its h must stay until every thread has read it."""
    x, a, b = torch.randn(3001, 24), torch.randn(16, 24), torch.randn(1536, 16)
    dy, spec, alpha_t = torch.randn(3001, 1536), Spec("silu", 1.0), torch.tensor(0.5)
    z = cpu.BACKEND.forward(x, a, b, alpha_t, None, spec, base=None, out=torch.empty_like(dy), save_z=True)

    def db(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            needs = {"need_dx": False, "need_da": False, "need_db": True}
            return cpu.BACKEND.backward(dy, x, a, b, z, alpha_t, None, spec, **needs)[2]
        finally:
            torch.set_num_threads(before)

    want = db(1)
    for _ in range(10):
        assert torch.equal(db(4), want)


@pytest.mark.slow
def test_more_than_2_31_elements():
    rows, cols, r = 70_000, 32_768, 2  # x has 2.3e9 elements, 4.6 GB
    skip_without_memory(16)
    x = torch.empty(rows, cols, dtype=torch.bfloat16)
    pattern = torch.randn(64, cols).bfloat16()
    for start in range(0, rows, 64):
        x[start : start + 64] = pattern[: min(64, rows - start)]
    a, b = torch.randn(r, cols) / cols**0.5, torch.randn(3, r)
    alpha_t, seed, dy, spec = torch.tensor(0.5), torch.tensor(3), torch.randn(rows, 3).bfloat16(), Spec("silu", 1.0, 26)
    y = torch.empty(rows, 3, dtype=x.dtype)
    z = cpu.BACKEND.forward(x, a, b, alpha_t, seed, spec, base=None, out=y, save_z=True)
    dx, _, _ = cpu.BACKEND.backward(dy, x, a, b, z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=True)
    tail = slice(rows - 5, rows)  # beyond element 2^31
    mask = torch.empty(rows, cols, dtype=torch.uint8)
    compiled._C.dropout_mask(mask.data_ptr(), rows, cols, 3, 26)
    expected = spec.inverse_keep * (x[tail].float() * mask[tail]) @ a.bfloat16().float().T
    torch.testing.assert_close(z[tail].float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(dx[tail] != 0, mask[tail].bool() & (dx[tail] != 0)) and (dx[tail] != 0).any()
