"""Operands of the CUDA kernels as callers hold them, on the PTX machine: any strides, addresses and dtypes."""

import sys

import pytest
import torch
from conftest import skip_unless_available
from helpers import Problem, eager, relative_error
from ptx_cuda import NAME, forward_and_backward, kernels, same
from torch import nn

import afa_kernels as afa
from afa_kernels.backend import reference
from afa_kernels.operator.options import Spec


@pytest.fixture(autouse=True)
def _available():
    skip_unless_available(NAME)


@pytest.mark.parametrize("r, rows", [(8, 1), (3, 1), (8, 5)])
def test_z_may_be_columns_of_a_wider_matrix(r, rows):
    """One row of such columns counts as contiguous, wherever it starts."""
    problem = Problem.random(rows, 64, 72, r, torch.bfloat16)
    z = torch.randn(rows, 3 + r).bfloat16()[:, 3:]
    assert z.data_ptr() % 4 == 2
    operands = (problem.dy, problem.x, problem.lora_a, problem.lora_b)
    rest = (torch.tensor(0.3), None, Spec("silu", 1.5))
    needs = {"need_dx": True, "need_da": True, "need_db": True}
    expected = kernels.backward(*operands, z.clone(memory_format=torch.contiguous_format), *rest, **needs)
    assert same(kernels.backward(*operands, z, *rest, **needs), expected)


def test_shared_input_of_odd_and_even_ranks_trains_on_one_token():
    layers = [afa.AFALinear(nn.Linear(64, 32, dtype=torch.bfloat16), r) for r in (3, 8)]
    shared = afa.AFASharedInput(layers)
    x = torch.randn(1, 64).bfloat16()
    with afa.use_backend(NAME):
        sum(y.float().sum() for y in shared(x)).backward()
    for member in layers:
        assert member.lora_b.grad.abs().sum() > 0


@pytest.mark.parametrize("columns", [slice(None), slice(8, 88), slice(0, 160, 2)], ids=["dense", "slice", "strided"])
def test_out_may_be_any_view(columns):
    problem = Problem.random(37, 72, 80, 16, torch.bfloat16)
    alpha_t = torch.tensor(0.3)
    operands = (problem.x, problem.lora_a, problem.lora_b, alpha_t, None, Spec("silu", 1.5))
    expected = torch.empty_like(problem.base)
    kernels.forward(*operands, base=problem.base, out=expected, save_z=False)
    storage = torch.full((37, 160 if columns != slice(None) else 80), 7.0, dtype=torch.bfloat16)
    out = storage[:, columns]
    out.copy_(problem.base)
    kernels.forward(*operands, base=out, out=out, save_z=False)
    assert torch.equal(out, expected)
    out.fill_(7.0)
    assert (storage == 7.0).all(), "something beside the view was written"


def test_gradients_of_float32_weights_keep_their_accumulators():
    problem = Problem.random(200, 64, 64, 16, torch.bfloat16, adapter_dtype=torch.float32)
    rounded = {name: getattr(problem, name).bfloat16() for name in ("lora_a", "lora_b")}
    _, _, _, da, db = forward_and_backward(problem)
    assert da.dtype == db.dtype == torch.float32
    _, _, _, da16, db16 = forward_and_backward(Problem(**(vars(problem) | rounded)))
    assert torch.equal(da.bfloat16(), da16) and torch.equal(db.bfloat16(), db16)
    assert not torch.equal(da, da.bfloat16().float())


@pytest.mark.parametrize("which", ["x", "dy"])
@pytest.mark.parametrize("r", [3, 16, 17, 40])
def test_an_infinite_element_does_what_it_does_in_torch(r, which):
    """It is multiplied by no zero that only pads a rank."""
    problem = Problem.random(20, 64, 72, r, torch.bfloat16)
    problem.lora_a, problem.lora_b = problem.lora_a.abs(), problem.lora_b.abs()
    getattr(problem, which)[5, 3] = torch.inf
    got = forward_and_backward(problem, spec=Spec("relu", 1.5))
    expected = forward_and_backward(problem, spec=Spec("relu", 1.5), backend=reference.BACKEND)
    for what, value, truth in zip(("y", "z", "dx", "da", "db"), got, expected, strict=True):
        assert torch.equal(value.isinf(), truth.isinf()) and torch.equal(value.isnan(), truth.isnan()), what
    assert any(value.isinf().any() for value in got)


def test_identity_is_plain_lora():
    problem = Problem.random(33, 64, 72, 8, torch.bfloat16)
    got = afa.afa_lora(problem.x, problem.lora_a, problem.lora_b, 0.0, backend=NAME)
    double = [t.double() for t in (problem.x, problem.lora_a, problem.lora_b)]
    assert relative_error(got, eager(*double, 0.0)) < 1e-2


def torch_calls(call) -> list[str]:
    """Return the names of torch's functions and methods that ``call`` calls from Python."""
    names = []

    def note(frame, event, function):
        if event == "c_call" and (function.__module__ or "").startswith("torch"):
            names.append(function.__name__)
        elif event == "c_call" and isinstance(function.__self__, torch.Tensor):
            names.append(function.__name__)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_a_call_asks_torch_for_memory_and_nothing_else(weights):
    """Of operands that the kernels read where they lie. Each of torch's methods takes as long as half of the compiled
    part of a call."""
    problem = Problem.random(9, 64, 72, 16, torch.bfloat16)
    x, a, b, dy, y = problem.x, problem.lora_a.to(weights), problem.lora_b.to(weights), problem.dy, problem.base.clone()
    rest = (torch.tensor(0.3), None, Spec("silu", 1.5))
    needs = {"need_dx": True, "need_da": True, "need_db": True}
    z = kernels.forward(x, a, b, *rest, base=problem.base, out=y, save_z=True)

    def forward():
        kernels.forward(x, a, b, *rest, base=problem.base, out=y, save_z=True)

    assert torch_calls(forward) == ["new_empty"] * 2  # z and scratch memory
    assert torch_calls(lambda: kernels.backward(dy, x, a, b, z, *rest, **needs)) == ["new_empty"] * 4
