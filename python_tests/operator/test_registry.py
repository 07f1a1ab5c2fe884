"""Choice of a backend: a pure function of the call, the request and what the machine has."""

import pytest
import torch
from helpers import altered

import afa_kernels as afa
from afa_kernels.backend import choice
from afa_kernels.backend.interface import Backend, BackendStatus, Call

pytestmark = pytest.mark.fast


def call(device="cpu", dtype=torch.float32, r=8, activation="silu"):
    return Call(device, dtype, 4, 16, 8, r, activation)


def fake(name, *, devices=(), available=True, refuses=None, automatic=True):
    return altered(
        Backend(),
        name=name,
        devices=frozenset(devices),
        status=lambda: BackendStatus(available, "" if available else f"{name} is not installed"),
        refuses=lambda call: refuses,
        forward=None,
        backward=None,
        automatic=automatic,
    )


@pytest.fixture
def table(monkeypatch):
    """An empty registry to fill; the real one comes back afterwards."""
    monkeypatch.setattr(choice, "_BACKENDS", {})
    choice.forget_choices()
    yield choice.register
    choice.forget_choices()


def test_first_that_can_take_the_call_wins_and_says_why_the_others_did_not(table):
    table(fake("hidden", automatic=False))
    table(fake("missing", available=False))
    table(fake("gpu_only", devices=["cuda"]))
    table(fake("picky", refuses="r=8 is too small"))
    table(fake("plain"))
    chosen, reason = choice.select(call(), None)
    assert chosen.name == "plain"
    assert reason == (
        "missing: missing is not installed; gpu_only: runs on cuda tensors, got cpu; picky: r=8 is too small"
    )


def test_request_is_strict(table):
    table(fake("picky", refuses="r=8 is too small"))
    table(fake("plain"))
    message = (
        r"backend 'picky' cannot take this call: r=8 is too small "
        r"\(call: M=4, K=16, N=8, r=8, float32, silu, cpu\)"
    )
    with pytest.raises(afa.BackendUnavailable, match=message):
        choice.select(call(), "picky")


def test_no_backend_at_all(table):
    table(fake("picky", refuses="never"))
    with pytest.raises(afa.BackendUnavailable, match="no backend can take this call: picky: never"):
        choice.select(call(), None)


def test_calls_forget_their_choice_when_a_backend_is_registered(table):
    def writing(name, value):
        def forward(x, a, b, alpha_t, seed, spec, rows=None, *, base, out, save_z):
            out.fill_(value)

        return altered(fake(name), forward=forward)

    operands = torch.randn(2, 4), torch.randn(1, 4), torch.randn(3, 1)
    table(writing("one", 1.0))
    assert torch.equal(afa.afa_lora(*operands, 0.5), torch.full((2, 3), 1.0))
    choice._BACKENDS.clear()
    table(writing("two", 2.0))
    assert torch.equal(afa.afa_lora(*operands, 0.5), torch.full((2, 3), 2.0))


def test_order_of_requests(monkeypatch):
    monkeypatch.setenv("AFA_KERNELS_BACKEND", "reference")
    assert choice.requested(None) == "reference"
    with afa.use_backend("torch"):
        assert choice.requested(None) == "torch"
        assert choice.requested("cpu") == "cpu"
    assert choice.requested(None) == "reference"


def test_unknown_names_are_named(monkeypatch):
    x, a, b = torch.randn(2, 4), torch.randn(1, 4), torch.randn(3, 1)
    with pytest.raises(ValueError, match="backend: expected one of .*torch.*, got 'cudnn'"):
        afa.afa_lora(x, a, b, 0.5, backend="cudnn")
    with pytest.raises(ValueError, match="got 'cudnn'"), afa.use_backend("cudnn"):
        pass
    monkeypatch.setenv("AFA_KERNELS_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="got 'cudnn'"):
        afa.afa_lora(x, a, b, 0.5)


def test_backends_lists_status():
    status = afa.backends()
    assert {"torch", "reference"} <= status.keys()
    for backend in status.values():
        assert bool(backend) or backend.reason


def test_plan_names_path_and_reason():
    x, a, b = torch.randn(2, 4), torch.randn(1, 4), torch.randn(3, 1)
    fused = afa.plan(x, a, b, 0.5, backend="torch")
    assert (fused.backend, fused.path, fused.reason) == ("torch", "fused", "requested")
    gemm = afa.plan(x, a, b, 0.0, base=torch.zeros(2, 3))
    assert (gemm.backend, gemm.path) == (afa.plan(x, a, b, 0.5).backend, "gemm")
    assert afa.plan(x, a, b, torch.tensor(0.0)).path == "fused"
    with pytest.raises(TypeError, match="unexpected arguments nonsense"):
        afa.plan(x, a, b, 0.5, nonsense=1)


def test_plan_sees_autocast(table):
    table(altered(fake("plain"), refuses=lambda call: str(call.dtype)))
    x, a, b = torch.randn(2, 4), torch.randn(1, 4), torch.randn(3, 1)
    with pytest.raises(afa.BackendUnavailable, match="torch.float32"):
        afa.plan(x, a, b, 0.5)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(afa.BackendUnavailable, match="torch.bfloat16"),
    ):
        afa.plan(x, a, b, 0.5)


def test_float64_is_taken_by_a_backend_that_can():
    x, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((2, 4), (1, 4), (3, 1)))
    assert afa.plan(x, a, b, 0.5).backend in ("torch", "reference")


def test_simulated_backends_are_never_chosen():
    for shape in ((1, 64, 64, 8), (512, 64, 64, 8), (512, 64, 64, 256)):
        m, k, n, r = shape
        chosen = afa.plan(torch.randn(m, k), torch.randn(r, k), torch.randn(n, r), 0.5).backend
        assert chosen in ("cpu", "torch")
