"""The Triton kernels in Triton's interpreter: every path, inputs between NaN guards, the dropout
mask. What the interpreter cannot show is in test_triton_compile.py and test_triton_gpu.py, and bfloat16, which it does
not have, in test_ptx_triton.py, which runs a few of these tests too."""

from contextlib import nullcontext

import pytest
import torch
from conftest import SIMULATED, skip_unless_available, skip_unless_taken
from helpers import DTYPES, assert_as_accurate_as_torch, relative_error
from ptx_problems import LAYOUTS

import afa_kernels as afa
from afa_kernels.backend import reference as reference_backend
from afa_kernels.backend import torch as torch_ops
from afa_kernels.backend.triton import backend
from afa_kernels.operator import dropout
from afa_kernels.operator.options import Spec

RESULTS = ("y", "z", "dx", "da", "db")


@pytest.fixture(autouse=True)
def _interpreter():
    skip_unless_available("triton")
    if "triton" not in SIMULATED:
        pytest.skip("not in the interpreter: TRITON_INTERPRET is not 1")


def guarded(t: torch.Tensor, row_padding: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``t`` inside a larger tensor of NaN, and that tensor. Its rows are not contiguous, its
    pointer is not aligned, and a read beside it shows as NaN."""
    rows, cols = t.shape
    around = torch.full((rows + 4, cols + row_padding), torch.nan, dtype=t.dtype)
    around[2:-2, 1 : cols + 1] = t
    return around[2:-2, 1 : cols + 1], around


def operands(m, k, n, r, dtype):
    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    return {
        "x": draw(m, k),
        "a": draw(r, k, scale=k**-0.5),
        "b": draw(n, r, scale=r**-0.5),
        "base": draw(m, n),
        "dy": draw(m, n),
    }


def run(module, spec, x, a, b, base, dy, *, out=None, alpha_t=0.3):
    """Return y, z and the gradients of a backend's own functions, called as the operator does."""
    alpha_t, seed = torch.tensor(alpha_t), torch.tensor(-987654321987654321)
    out = torch.full_like(base, torch.nan) if out is None else out
    z = module.forward(x, a, b, alpha_t, seed, spec, base=base, out=out, save_z=True)
    gradients = module.backward(dy, x, a, b, z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=True)
    return dict(zip(RESULTS, (out, z, *gradients), strict=True))


def assert_accurate(got, spec, given):
    plain = run(torch_ops.BACKEND, spec, **given)
    wide = {name: t.double() for name, t in given.items()}
    truth = run(reference_backend.BACKEND, spec, **wide)
    for what in RESULTS:
        dtype = given["x"].dtype
        assert_as_accurate_as_torch(got[what], plain[what], truth[what], what, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("p", [0, 77], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("shape", [(37, 70, 67, 5), (65, 97, 35, 40)], ids=str)
def test_nothing_beside_the_operands_is_read_or_written(shape, p, dtype):
    skip_unless_taken("triton", dtype)
    given = operands(*shape, dtype)
    inside = {name: guarded(t)[0] for name, t in given.items()}
    out, around = guarded(torch.full_like(given["base"], torch.nan))
    spec = Spec("gelu", 1.7, p)
    assert_accurate(run(backend.BACKEND, spec, **inside, out=out), spec, given)
    assert around.isnan().sum() == around.numel() - out.numel()


# (M, K, N, r), and the kernels that one forward and one backward launch there.
PATHS = {
    "one pass": ((70, 72, 48, 16), ("xa_phi_hb", "dy_pass", "dphi", "x_pass", "weight_grad")),
    "segments": ((20, 300, 130, 16), ("project", "phi_hb", "dy_pass", "dphi", "x_pass",
    "weight_grad")), "padded rank": ((20, 40, 24, 3), ("xa_phi_hb", "dy_pass", "dphi", "x_pass",
    "weight_grad")), "packed rank": ((20, 40, 24, 40), ("pack", "xa_phi_hb", "pack", "dyb_dphi",
    "dy_pass", "x_pass", "weight_grad")), "two passes": ((70, 72, 48, 64), ("xa_phi_hb", "dyb_dphi",
    "dy_pass", "x_pass", "weight_grad")), "two passes, segments": (
        (20, 300, 270, 128),
        ("project", "phi_hb", "project", "dphi", "dy_pass", "x_pass", "weight_grad"),
    ),
    "chunks of several tiles": ((150, 40, 24, 16), ("xa_phi_hb", "dy_pass", "dphi", "x_pass",
    "weight_grad")),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths(path):
    from afa_kernels.backend.triton import configs, launch

    shape, names = PATHS[path]
    given, spec = operands(*shape, torch.float32), Spec("silu", 0.5)
    with launch.recording(configs.device_of(given["x"].device)) as launches:
        run(backend.BACKEND, spec, **given)
    assert len(launches) == len(names), [entry.name for entry in launches]
    for entry, name in zip(launches, names, strict=True):
        assert entry.name.startswith(name), (entry.name, name)
    assert_accurate(run(backend.BACKEND, spec, **given), spec, given)


@pytest.mark.parametrize("m", [20, 70], ids=["segments", "one pass"])
def test_accumulating_into_the_base_itself(m):
    given, spec = operands(m, 300, 140, 16, torch.float32), Spec("silu", 0.5)
    want = run(backend.BACKEND, spec, **given)["y"]
    base = given["base"].clone()
    got = run(backend.BACKEND, spec, **given | {"base": base}, out=base)["y"]
    assert got is base and torch.equal(got, want)


@pytest.mark.parametrize("inplace", [False, True], ids=["base", "inplace"])
def test_rows_too_far_apart_for_int32_are_copied(monkeypatch, inplace):
    from afa_kernels.backend.triton import launch, passes

    given, spec = operands(20, 40, 24, 16, torch.float32), Spec("silu", 0.5)
    far = {name: guarded(t)[0] for name, t in given.items()}
    want = run(backend.BACKEND, spec, **given)
    near = launch.int32_offsets
    for module in (launch, passes):
        monkeypatch.setattr(module, "int32_offsets", lambda t, *rows: t.is_contiguous() and near(t))
    out = far["base"] if inplace else guarded(torch.full_like(given["base"], torch.nan))[0]
    got = run(backend.BACKEND, spec, **far, out=out)
    for what in RESULTS:
        torch.testing.assert_close(got[what], want[what])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", ["f32", "dtype of x"])
@pytest.mark.parametrize(
    "m, k, n, r, layout",
    [
        (70, 72, 48, 16, "every other row"),
        (37, 70, 67, 5, "rows at odd places"),
        (20, 300, 140, 24, "columns apart"),
        (33, 40, 24, 8, "packed"),
    ],
)
def test_a_and_b_are_rounded_and_padded_where_they_are_read(m, k, n, r, layout, weights, dtype):
    """The bits of a call whose a and b the caller has rounded, and padded to a rank that needs no mask."""
    skip_unless_taken("triton", dtype)
    given, spec = operands(m, k, n, r, dtype), Spec("silu", 0.5, 60)
    a, b = torch.randn(r, k) * k**-0.5, torch.randn(n, r) * r**-0.5
    if weights != "f32":
        a, b = a.to(dtype), b.to(dtype)
    padded = max(16, 1 << (r - 1).bit_length())
    ready = {
        "a": torch.cat([a, torch.zeros(padded - r, k)]).to(dtype),
        "b": torch.cat([b, torch.zeros(n, padded - r)], 1).to(dtype),
    }
    want = run(backend.BACKEND, spec, **given | ready)
    got = run(backend.BACKEND, spec, **given | {"a": LAYOUTS[layout](a), "b": LAYOUTS[layout](b)})
    want |= {"z": want["z"][:, :r], "da": want["da"][:r], "db": want["db"][:, :r]}
    for what in RESULTS:
        assert torch.equal(got[what].to(dtype), want[what]), (what, dtype)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 123456789012345])
def test_the_mask_is_the_one_of_the_contract(seed):
    """With x = 1 and one 1 in each row of a, z shows the mask element by element."""
    m, k, threshold = 40, 70, 100
    seed, alpha_t = torch.tensor(seed), torch.tensor(1.0)
    spec = Spec("relu", 1.0, threshold)
    keep = dropout.keep_mask(seed, m, k, threshold).float() * dropout.inverse_keep(threshold)
    x, b = torch.ones(m, k), torch.zeros(8, 16)
    for first in (0, 16, k - 16):
        a = torch.eye(k)[first : first + 16]
        z = backend.BACKEND.forward(x, a, b, alpha_t, seed, spec, base=None, out=torch.empty(m, 8), save_z=True)
        torch.testing.assert_close(z, keep[:, first : first + 16])
    # In the backward dz is 1 in one column, and a is 1 there: dx is the mask.
    a, b = torch.zeros(16, k), torch.zeros(8, 16)
    a[0], b[0, 0] = 1, 1
    dy = torch.zeros(m, 8)
    dy[:, 0] = 1
    z, alpha_t = torch.zeros(m, 16), torch.tensor(0.0)  # phi' is 1
    dx, da, _ = backend.BACKEND.backward(dy, x, a, b, z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=False)
    torch.testing.assert_close(dx, keep)
    torch.testing.assert_close(da[0], keep.sum(0))


@pytest.mark.parametrize("activation", ["tanh", "gelu_tanh", "silu", "sin"])
def test_activations_keep_their_relative_accuracy_near_zero(activation):
    given = operands(33, 40, 24, 16, torch.float32)
    given["x"] *= 1e-4
    given["base"] *= 0
    spec = Spec(activation, 1.0)
    wide = {name: t.double() for name, t in given.items()}
    got = run(backend.BACKEND, spec, **given, alpha_t=1.0)
    truth = run(reference_backend.BACKEND, spec, **wide, alpha_t=1.0)
    for what in RESULTS:
        assert relative_error(got[what], truth[what]) < 1e-6, what


def test_a_call_without_backward_needs_compiles_no_gradient():
    from afa_kernels.backend.triton import configs, launch

    given = operands(33, 40, 24, 16, torch.float32)
    alpha_t, spec = torch.tensor(0.5), Spec("silu", 1.0)
    expected = {
        (False, False, False): (),
        (True, False, False): ("dy_pass", "dphi", "x_pass"),
        (False, False, True): ("dy_pass", "weight_gradients"),
        (False, True, False): ("dy_pass", "dphi", "x_pass", "weight_gradients"),
    }
    for needs, names in expected.items():
        flags = dict(zip(("need_dx", "need_da", "need_db"), needs, strict=True))
        operand = (given["dy"], given["x"], given["a"], given["b"], torch.empty(33, 16))
        with launch.recording(configs.device_of(given["x"].device)) as launches:
            got = backend.BACKEND.backward(*operand, alpha_t, None, spec, **flags)
        assert [t is not None for t in got] == list(needs)
        assert tuple(e.name.removesuffix("_kernel").removesuffix("_backward") for e in launches) == names


def test_identity_asked_for_by_name_is_the_linear_branch():
    given = operands(33, 40, 24, 16, torch.float32)
    x, a, b, base = (given[name] for name in ("x", "a", "b", "base"))
    got = afa.afa_lora(x, a, b, 0.0, base=base, scaling=2.0, backend="triton")
    torch.testing.assert_close(got, base + 2 * (x @ a.T) @ b.T)


def test_no_context_is_needed_for_the_cpu():
    assert isinstance(backend._on_device(torch.empty(1)), nullcontext)


@pytest.mark.parametrize("r", [3, 16, 17, 70])
@pytest.mark.parametrize("owners", [False, True], ids=["lone", "owners"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_infinity_goes_where_the_sums_go_and_nowhere_else(r, owners):
    """No zero of a padded rank may meet it: infinity times 0 is NaN."""
    x, dy = torch.randn(40, 72), torch.randn(40, 48)
    x[3, 7], dy[20, 4] = torch.inf, torch.inf
    a, b = torch.rand(2, r, 72) + 0.1, torch.rand(2, 48, r) + 0.1
    more = {"offsets": torch.tensor([15, 40]).int(), "ranks": torch.tensor([r, 2]).int()} if owners else {}
    leaves = [t.requires_grad_() for t in ((x, a, b) if owners else (x, a[0], b[0]))]
    found = []
    for name in ("triton", "reference"):
        y = afa.afa_lora(*leaves, 0.5, activation="relu", backend=name, **more)
        (dx,) = torch.autograd.grad(y, leaves[0], dy)
        found.append([y.isnan(), y.isinf(), dx.isnan(), dx.isinf()])
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    assert found[0][1][3].all() and found[0][3][20].all()
