"""Bad input: each error names the argument, what came and what is wanted."""

import math

import pytest
import torch
from rows_by_owner import ByOwner

import afa_kernels as afa
from afa_kernels.backend import compiled
from afa_kernels.operator import checks

pytestmark = pytest.mark.fast

M, K, N, R = 3, 8, 6, 2


RECOGNIZERS = ("recognizes_lora", "recognizes_linear", "recognizes_shared")


@pytest.fixture(autouse=True, params=["native", "python"])
def recognizer(request, monkeypatch):
    """Every test with and without the compiled module's recognition of operands that pass."""
    if request.param == "python":
        for name in RECOGNIZERS:
            monkeypatch.setattr(compiled, name, compiled._recognizes_nothing)
    return request.param


def good(**changes):
    arguments = {
        "x": torch.randn(M, K),
        "lora_a": torch.randn(R, K),
        "lora_b": torch.randn(N, R),
        "alpha_t": 0.5,
    }
    return arguments | changes


BAD = [
    ("x is a list", {"x": [[1.0]]}, TypeError, "x: expected a torch.Tensor, got list"),
    (
        "x is int",
        {"x": torch.ones(M, K, dtype=torch.int64)},
        TypeError,
        "x: expected float64.*got int64",
    ),
    (
        "x is complex",
        {"x": torch.ones(M, K, dtype=torch.complex64)},
        TypeError,
        "x: expected .*got complex64",
    ),
    ("x is sparse", {"x": torch.eye(K).to_sparse()}, TypeError, "x: expected a dense"),
    (
        "x is nested",
        {"x": torch.nested.nested_tensor([torch.eye(K)], layout=torch.jagged)},
        TypeError,
        "x: .* got a nested tensor",
    ),
    ("x has no dimension", {"x": torch.tensor(1.0)}, ValueError, "x: expected shape .*0-dim"),
    (
        "a has other K",
        {"lora_a": torch.randn(R, K + 1)},
        ValueError,
        r"lora_a: expected shape \(r, 8\).*got \(2, 9\)",
    ),
    ("a is 1-d", {"lora_a": torch.randn(K)}, ValueError, r"lora_a: .*got \(8,\)"),
    (
        "rank 0",
        {"lora_a": torch.randn(0, K), "lora_b": torch.randn(N, 0)},
        ValueError,
        "rank of at least 1",
    ),
    (
        "b has other r",
        {"lora_b": torch.randn(N, R + 1)},
        ValueError,
        r"lora_b: expected shape \(out_features, 2\)",
    ),
    (
        "no features",
        {"x": torch.randn(M, 0), "lora_a": torch.randn(R, 0)},
        ValueError,
        "at least one feature",
    ),
    (
        "b elsewhere",
        {"lora_b": torch.randn(N, R, device="meta")},
        ValueError,
        "lora_b: expected on cpu.*got meta",
    ),
    (
        "alpha above 1",
        {"alpha_t": 1.01},
        ValueError,
        r"alpha_t: expected a value in \[0, 1\], got 1.01",
    ),
    ("alpha below 0", {"alpha_t": -1e-9}, ValueError, "alpha_t: expected a value"),
    ("alpha NaN", {"alpha_t": math.nan}, ValueError, "alpha_t: .*got nan"),
    ("alpha string", {"alpha_t": "0.5"}, TypeError, "alpha_t: .*got str"),
    ("alpha bool", {"alpha_t": True}, TypeError, "alpha_t: .*got bool"),
    (
        "alpha tensor of 1-d",
        {"alpha_t": torch.ones(1)},
        TypeError,
        "alpha_t: .*got a 1-dim float32",
    ),
    (
        "alpha float64",
        {"alpha_t": torch.tensor(0.5, dtype=torch.float64)},
        TypeError,
        "got a 0-dim float64",
    ),
    (
        "alpha tensor of 2",
        {"alpha_t": torch.tensor(2.0)},
        ValueError,
        r"alpha_t: expected a value in \[0, 1\], got 2.0",
    ),
    ("alpha tensor NaN", {"alpha_t": torch.tensor(math.nan)}, ValueError, "alpha_t: .*got nan"),
    (
        "alpha needs grad",
        {"alpha_t": torch.tensor(0.5, requires_grad=True)},
        ValueError,
        "not differentiable in alpha_t",
    ),
    (
        "activation",
        {"activation": "swish"},
        ValueError,
        "activation: expected one of relu, silu.*got 'swish'",
    ),
    ("scaling string", {"scaling": "2"}, TypeError, "scaling: expected a float, got str"),
    ("scaling inf", {"scaling": math.inf}, ValueError, "scaling: expected a finite value, got inf"),
    (
        "p of 1",
        {"dropout_p": 1.0},
        ValueError,
        r"dropout_p: expected a probability in \[0, 1\), got 1.0",
    ),
    ("p NaN", {"dropout_p": math.nan}, ValueError, "dropout_p: .*got nan"),
    ("p string", {"dropout_p": "0.1"}, TypeError, "dropout_p: .*got str"),
    ("seed float", {"dropout_p": 0.1, "dropout_seed": 1.5}, TypeError, "dropout_seed: .*got float"),
    (
        "seed too big",
        {"dropout_p": 0.1, "dropout_seed": 2**63},
        ValueError,
        "dropout_seed: .*64-bit",
    ),
    (
        "seed int32",
        {"dropout_seed": torch.tensor(1, dtype=torch.int32)},
        TypeError,
        "dropout_seed: .*int32",
    ),
    (
        "base shape",
        {"base": torch.randn(M, N + 1)},
        ValueError,
        r"base: expected shape \(3, 6\), got \(3, 7\)",
    ),
    ("inplace without base", {"inplace": True}, ValueError, "inplace: expected a base"),
    (
        "leaf base",
        {"base": torch.randn(M, N, requires_grad=True), "inplace": True},
        ValueError,
        "base: a leaf that requires grad cannot be accumulated into",
    ),
    (
        "expanded base",
        {"base": torch.randn(1, N).expand(M, N), "inplace": True},
        ValueError,
        "base: an expanded view cannot be accumulated into",
    ),
]


@pytest.mark.parametrize("changes,error,message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_afa_lora_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        afa.afa_lora(**good(**changes))


@pytest.mark.parametrize(
    "weight,bias,error,message",
    [
        (torch.randn(N, K + 1), None, ValueError, r"weight: expected shape \(6, 8\).*got \(6, 9\)"),
        (
            torch.randn(N, K).half(),
            None,
            TypeError,
            "weight: expected float32, the dtype of x, got float16",
        ),
        (
            torch.randn(N, K),
            torch.randn(N, 1),
            ValueError,
            r"bias: expected shape \(6,\), got \(6, 1\)",
        ),
        (
            torch.randn(N, K),
            torch.ones(N, dtype=torch.int32),
            TypeError,
            "bias: expected .*got int32",
        ),
        (None, None, TypeError, "weight: expected a torch.Tensor, got NoneType"),
    ],
)
def test_afa_linear_refuses(weight, bias, error, message):
    with pytest.raises(error, match=message):
        afa.afa_linear(**good(weight=weight, bias=bias))


def test_nothing_is_written_when_refused():
    base = torch.randn(M, N)
    before = base.clone()
    with pytest.raises(ValueError):
        afa.afa_lora(**good(base=base, inplace=True, activation="swish"))
    assert torch.equal(base, before)


def test_good_call_is_accepted():
    assert afa.afa_lora(**good()).shape == (M, N)


def operands(shape, dtype):
    """Operands of a layer; for two dimensions strided ones."""
    x = torch.randn(*shape, K).to(dtype)
    x = x.T.contiguous().T if x.dim() == 2 else x
    base = torch.randn(*shape, N).to(dtype)
    weight, bias = torch.nn.Parameter(torch.randn(K, N).to(dtype)).T.detach(), torch.randn(2 * N).to(dtype)[::2]
    return x, base, weight, bias, torch.nn.Parameter(torch.randn(R, K)), torch.randn(N, R, dtype=torch.float64)


@pytest.mark.parametrize("dtype", checks.FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(), (M,), (1,), (0,), (2, M), (2, 1, M)], ids=str)
def test_what_is_right_passes_and_is_recognized(shape, dtype, recognizer):
    x, base, weight, bias, a, b = operands(shape, dtype)
    for right in (None, base):
        assert checks.lora(x, a, b, right, inplace=False)
    for right in (None, bias):
        assert checks.linear(x, weight, right, a, b)
    layers = [(weight, bias, a, b), (weight, None, a, b)]
    assert checks.shared_input(x, layers)
    if recognizer == "native" and compiled._C is not None and compiled._C.has_exchange_table():
        assert compiled.recognizes_lora(x, a, b, base) and compiled.recognizes_lora(x, a, b, None)
        assert compiled.recognizes_linear(x, weight, bias, a, b) and compiled.recognizes_linear(x, weight, None, a, b)
        assert compiled.recognizes_shared(x, layers)


@pytest.mark.parametrize(
    "transform", [lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), lambda f, x: torch.func.jvp(f, (x,), (x,))]
)
def test_transforms_of_torch_func_are_refused(transform):
    """Whether anything requires grad or not; a part of a tangent would be lost in silence."""
    p = ByOwner.random((2, 3), 8, 5, 2)
    stack = afa.AFALinearStack(torch.nn.Linear(8, 5), {"a": {"r": 2}, "b": {"r": 2}})
    with pytest.raises(NotImplementedError, match="rows by owner: not possible inside a transform of"):
        transform(lambda x: afa.afa_lora(x, p.lora_a, p.lora_b, 0.5, offsets=p.offsets), p.x)
    with (
        afa.adapters_of(stack, ["a", "b", "a", "b", "a"]),
        pytest.raises(NotImplementedError, match="samples of several adapters: not possible .*use torch.autograd.grad"),
    ):
        transform(stack, p.x)
