"""The grouped GEMM of the Triton backend: which calls take it, and what a layer makes of it in Triton's interpreter.
conformance/ has its numbers (the kind ``experts``), test_ptx_triton.py its compiled code."""

from unittest import mock

import pytest
import torch
from helpers import assert_as_accurate_as_torch

import afa_kernels as afa
from afa_kernels import torch_private
from afa_kernels.backend.triton import backend

pytest.importorskip("triton")

from afa_kernels.backend.triton import configs, grouped_gemm, launch  # noqa: E402

SIZES = (30, 0, 5, 40)


def on(arch: str):
    return mock.patch.object(configs, "device_of", lambda _: configs.Device(arch, 100))


@pytest.mark.parametrize(
    "arch, dtypes",
    [
        ("sm_80", "bf16 f16 tf32"), ("sm_86", "bf16 f16 tf32"), ("sm_120", "bf16 f16 tf32"),
        ("sm_90", "f16 tf32"), ("sm_100", "f16 tf32"), ("sm_103", "f16 tf32"),
        ("gfx942", ""), ("xpu", ""),
    ],
)  # fmt: skip
def test_it_runs_where_torch_has_no_such_kernel(arch, dtypes, monkeypatch):
    monkeypatch.setattr(torch_private, "has_grouped_mm", lambda *_: True)
    for name, dtype in {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}.items():
        x, weight = torch.zeros(4, 8, dtype=dtype), torch.zeros(2, 16, 8, dtype=dtype)
        monkeypatch.setattr(launch, "allows_tf32", lambda: True)
        with on(arch):
            assert bool(backend.BACKEND.multiplies(x, weight, 8)) == (name in dtypes.split()), name
            assert backend.BACKEND.multiplies(x, weight[0], 8) is None  # torch's GEMM adds to the branch
    monkeypatch.setattr(launch, "allows_tf32", lambda: False)
    with on(arch):
        assert backend.BACKEND.multiplies(torch.zeros(4, 8), torch.zeros(2, 16, 8), 8) is None


def test_it_runs_with_a_torch_that_has_no_grouped_mm(monkeypatch):
    monkeypatch.setattr(torch_private, "has_grouped_mm", lambda *_: False)
    with on("sm_90"):
        x, weight = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((4, 8), (2, 16, 8)))
        assert "grouped_mm" in backend.BACKEND.multiplies(x, weight, 8)


def test_matrices_beyond_32_bits_are_left_to_torch():
    x, weight = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((4, 2**16), (2, 2**16, 2**16)))
    with on("sm_80"):
        assert backend.BACKEND.multiplies(x, weight, 8) is None
        assert backend.BACKEND.multiplies(x, weight[:, : 2**14], 8)


def random_call(matrices: int, dtype: torch.dtype):
    """Return the leaves of a layer (x, weight, bias, A and B), what else it is given, and dy."""
    torch.manual_seed(1)
    owners, (k, n, r) = len(SIZES), (72, 40, 12)
    shapes = ((sum(SIZES), k), (matrices, n, k), (matrices, n), (owners, r, k), (owners, n, r))
    leaves = [torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 3 else 1.0) for shape in shapes]
    given = {
        "offsets": torch.tensor(SIZES).cumsum(0).int(), "ranks": torch.tensor([12, 5, 7, 0], dtype=torch.int32),
        "dropout_p": 0.3, "dropout_seed": 77,
    }  # fmt: skip
    return [t.to(dtype) for t in leaves], given, torch.randn(sum(SIZES), n).to(dtype)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("matrices", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_a_layer(dtype, matrices):
    """Its result and all its gradients, those of the weight and the bias too."""
    tensors, given, dy = random_call(matrices, dtype)

    def run(name: str, wide: torch.dtype):
        leaves = [t.to(wide).requires_grad_() for t in tensors]
        alpha_t, scaling = torch.tensor([0.3, 0.7, 0.0, 1.0]), torch.tensor([1.5, 1.0, -2.0, 0.5])
        y = afa.afa_linear(*leaves, alpha_t, scaling=scaling, backend=name, **given)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(wide))]

    with mock.patch.object(grouped_gemm, "_product", wraps=grouped_gemm._product) as product:
        got = run("triton", dtype)
    assert product.call_count == 2
    plain, truth = run("torch", dtype), run("reference", torch.float64)
    for what, *values in zip(("y", "dx", "dweight", "dbias", "da", "db"), got, plain, truth, strict=True):
        assert_as_accurate_as_torch(*values, what, dtype)


@pytest.mark.usefixtures("interpreter")
def test_float32_sums_of_many_terms_stay_as_accurate():
    """They are summed in segments: in one sum the error grows with the number of terms."""
    torch.manual_seed(1)
    x, weight, b = torch.rand(4, 8192), torch.rand(1, 16, 8192), torch.zeros(1, 16, 4)
    offsets = torch.tensor([4], dtype=torch.int32)
    y = afa.afa_linear(x, weight, None, torch.zeros(1, 4, 8192), b, 0.0, offsets=offsets, backend="triton")
    truth = x.double() @ weight[0].double().T
    assert ((y - truth).norm() / truth.norm()).item() < 1e-7


@pytest.mark.usefixtures("interpreter")
def test_rows_behind_the_last_offset_are_zero():
    """Though the contract leaves them undefined: nothing is computed for them, such as those of other processes."""
    (x, weight, bias, a, b), given, dy = random_call(4, torch.float32)
    given["offsets"] = given["offsets"].clamp(max=33)
    x[33:], dy[33:] = torch.nan, torch.nan
    y = afa.afa_linear(x.requires_grad_(), weight, bias, a, b, 0.5, backend="triton", **given)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y[:33].all() and dx[:33].isfinite().all() and not y[33:].any() and not dx[33:].any()


@pytest.mark.usefixtures("interpreter")
def test_plan_says_so():
    (x, weight, _, a, b), given, _ = random_call(2, torch.float16)
    del given["dropout_seed"]
    assert afa.plan(x, a, b, 0.5, weight=weight, backend="triton", **given).frozen == "fused: Triton's interpreter"
    assert not afa.plan(x, a, b, 0.5, weight=weight[0], backend="triton", **given).frozen.startswith("fused")


@pytest.mark.usefixtures("interpreter")
def test_a_layer_saves_no_more_than_beside_grouped_mm():
    """x, A, B and z, and references to the weight and to whose rows are whose."""
    (x, weight, bias, a, b), given, _ = random_call(4, torch.float16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = afa.afa_linear(x, weight, bias, a.requires_grad_(), b.requires_grad_(), 0.5, backend="triton", **given)
    assert y.shape == (sum(SIZES), 40)
    known = {t.data_ptr() for t in (x, weight, a, b, given["offsets"], given["ranks"])}
    (z,) = (t for t in saved if t.data_ptr() not in known and t.numel() > len(SIZES))
    assert z.shape == (sum(SIZES), 12)
