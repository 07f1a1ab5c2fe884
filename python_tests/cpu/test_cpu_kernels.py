"""The CPU kernels where random problems (conformance/) do not come: every value of an activation, results that are
written past the cache, many blocks of rows, more than 2^31 elements."""

import pytest
import torch
from conformance.problems import Problem
from conftest import skip_without_memory
from helpers import run_on_isa

from afa_kernels.backend import compiled, cpu
from afa_kernels.operator.activation import ACTIVATIONS, phi
from afa_kernels.operator.options import Spec

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not cpu.BACKEND.status(), reason=cpu.BACKEND.status().reason),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = compiled._C.cpu_isas() if cpu.BACKEND.status() else []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_values_are_the_python_ones(activation):
    # K = 1 and N = 1 with factors 1 make the operator phi itself, and dx its slope.
    z = torch.cat((torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4])))
    one, alpha_t = torch.ones(1, 1), torch.tensor(1.0)
    x = z[:, None].contiguous()
    y = torch.empty_like(x)
    spec = Spec(activation, 1.0)
    z = cpu.BACKEND.forward(x, one, one, alpha_t, None, spec, base=None, out=y, save_z=True)
    dx, _, _ = cpu.BACKEND.backward(
        torch.ones_like(x), x, one, one, z, alpha_t, None, spec, need_dx=True, need_da=False, need_db=False
    )
    exact = x.double()
    torch.testing.assert_close(y.double(), phi(exact, 1.0, activation), rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(dx.double(), ACTIVATIONS[activation].slope(exact), rtol=2e-6, atol=3e-6)


def past_the_cache() -> None:
    """Results above 12 MB, from which every machine writes them past the cache, have the bits of a few rows, which are
    not. Of two layers one has such a y."""
    for dtype in DTYPES:
        for shape in ((3300, 2048, 2048, 4), (2000, 3168, 3168, 4), (2000, 3168, (3168, 40), (4, 3))):
            problem = Problem.of(dtype, *shape)
            o = problem.outputs[0]
            for t in (problem.x, o.dy):
                t[5, 3], t[7, 3] = torch.nan, torch.finfo(dtype).max
            every = problem.run(cpu.BACKEND)
            assert every["y0"].nbytes > 12 << 20
            for rows in (slice(0, 50), slice(len(problem.x) - 50, None)):
                for name, t in problem.of_rows(rows).run(cpu.BACKEND).items():
                    if name[:2] not in ("da", "db"):
                        torch.testing.assert_close(every[name][rows], t, rtol=0, atol=0, equal_nan=True)
            assert every["y0"][5].isnan().all() and not every["y0"][6].isnan().any(), dtype


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_results_that_are_written_past_the_cache(isa):
    run_on_isa(isa, "from cpu import test_cpu_kernels\ntest_cpu_kernels.past_the_cache()")


def test_a_rank_below_r_leaves_gaps_in_db():
    """Where N is in whole tiles and the rank needs no padding, a dense dB is summed where it lies; this one is not."""
    problem = Problem.of_owners(torch.float32, (20, 20), 64, 192, 8, ranks=(4, 4))
    wide, (o,) = problem.run(cpu.BACKEND)["db0"], problem.outputs
    o.a, o.b, problem.rows = o.a[:, :4].contiguous(), o.b[..., :4].contiguous(), problem.rows._replace(ranks=None)
    assert torch.equal(wide[..., :4], problem.run(cpu.BACKEND)["db0"]) and not wide[..., 4:].any()


def test_db_alone_over_many_blocks_of_rows():
    """Without dz a block of rows ends with dB: its h must stay until every thread has read it."""
    problem = Problem.of(torch.float32, 3001, 24, 1536, 16)
    results = problem.forward(cpu.BACKEND)

    def db(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return problem.backward(cpu.BACKEND, results, {"db0"})["db0"]
        finally:
            torch.set_num_threads(before)

    want = db(1)
    for _ in range(10):
        assert torch.equal(db(4), want)


def test_gradients_of_float32_factors_are_not_rounded_to_the_dtype_of_x():
    results = Problem.of(torch.bfloat16, 300, 64, 64, 8, weights=torch.float32).run(cpu.BACKEND)
    for gradient in (results["da0"], results["db0"]):
        assert not torch.equal(gradient, gradient.bfloat16().float())


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
