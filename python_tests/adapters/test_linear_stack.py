"""AFALinearStack: one batch for many adapters, each with its rank, scaling, activation, dropout and alpha_t."""

from functools import partial

import pytest
import torch
from helpers import eager, mask_and_p
from torch import nn

import afa_kernels as afa
from afa_kernels.layers import mixed

pytestmark = pytest.mark.fast

ADAPTERS = {
    "a": {"r": 8, "lora_alpha": 16},
    "b": {"r": 3, "lora_alpha": 2},
    "c": {"r": 5, "activation": "tanh", "use_rslora": True},
    "d": {"r": 4, "activation": "relu"},
}
ALPHAS = {"a": 0.5, "b": 1.0, "c": 0.375, "d": 0.0}
ORDERS = {
    "sorted": ["b", "b", "a", "__base__", "__base__", "c", "d"],
    "mixed": ["b", "d", "a", "__base__", "c", "b", "a"],
    "two": ["a", "b", "a", "a", "b", "b", "a"],
}


def filled(module, alphas=ALPHAS):
    """Draw every B, which is 0 at first, and set alpha_t of each adapter."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    for name, value in alphas.items():
        afa.set_alpha_t(module, value, name)
    return module


def stack_of(base=None, adapters=ADAPTERS, alphas=ALPHAS):
    return filled(afa.AFALinearStack(nn.Linear(12, 10) if base is None else base, adapters), alphas)


def step(layer, names, x, dy):
    """Return y, dx and the gradients of the adapters after one step."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with afa.adapters_of(layer, names):
        y = layer(x)
    y.backward(dy)
    grads = {name: (branch.lora_a.grad, branch.lora_b.grad) for name, branch in layer.adapters.items()}
    return y.detach(), x.grad, grads


def rows_of(names, name):
    return [i for i, other in enumerate(names) if other == name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_a_mixed_step_has_the_bits_of_separate_steps(order, dtype):
    """The frozen weight is 0, for the rounding of its GEMM may depend on the number of rows. So may that of torch's
    products, which compute float64."""
    same = partial(torch.allclose, rtol=1e-12, atol=1e-14) if dtype == torch.float64 else torch.equal
    base = nn.Linear(12, 10, dtype=dtype)
    with torch.no_grad():
        base.weight.zero_()
    layer, names = stack_of(base), ORDERS[order]
    x, dy = torch.randn(7, 3, 12, dtype=dtype), torch.randn(7, 3, 10, dtype=dtype)
    y, dx, grads = step(layer, names, x, dy)
    for name in ADAPTERS:
        rows = rows_of(names, name)
        if not rows:
            assert grads[name] == (None, None)
            continue
        own_y, own_dx, own = step(layer, name, x[rows], dy[rows])
        assert same(y[rows], own_y) and same(dx[rows], own_dx), name
        assert all(map(same, grads[name], own[name])), name
        assert all(grad == (None, None) for other, grad in own.items() if other != name)
    free = rows_of(names, "__base__")
    assert torch.equal(y[free], layer.base_layer(x[free])) and not dx[free].any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_base_that_has_to_be_called_computes_the_same(order):
    layer, names = stack_of(), ORDERS[order]
    x, dy = torch.randn(7, 3, 12), torch.randn(7, 3, 10)
    wanted = step(layer, names, x, dy)
    layer.base_layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(step(layer, names, x, dy), wanted)


def test_names_may_be_given_for_rows_or_for_all():
    layer, x = stack_of(), torch.randn(2, 3, 12)
    names = ["a", "b", "__base__", "c", "b", "a"]
    with afa.adapters_of(layer, names):
        y = layer(x)
    for i, name in enumerate(names):
        with afa.adapters_of(layer, name):
            torch.testing.assert_close(layer(x).view(6, 10)[i], y.view(6, 10)[i])
    with afa.adapters_of(layer, "a"):
        torch.testing.assert_close(layer(x[0, 0]), y[0, 0])
        assert layer(x[:0]).shape == (0, 3, 10) and layer(x[:, :0]).shape == (2, 0, 10)
    with afa.adapters_of(layer, []):
        assert layer(x[:0]).shape == (0, 3, 10)


def counted(monkeypatch):
    calls = []
    for name in ("afa_linear", "afa_lora"):
        original = getattr(mixed, name)

        def call(*args, _name=name, _original=original, **options):
            calls.append(_name)
            return _original(*args, **options)

        monkeypatch.setattr(mixed, name, call)
    permute = mixed.Gather.apply
    monkeypatch.setattr(mixed.Gather, "apply", lambda *args: (calls.append("permute"), permute(*args))[1])
    return calls


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a", "a", "b"], ["afa_linear"]),
        (["b", "a", "a"], ["afa_linear"]),
        (["a", "b", "a"], ["permute", "afa_linear", "permute"]),
        (["a", "b", "c"], ["afa_linear", "afa_lora"]),
        (["__base__", "__base__"], []),
    ],
    ids=" ".join,
)
def test_one_call_for_one_activation_and_no_copy_of_a_sorted_batch(monkeypatch, names, wanted):
    layer = stack_of()
    calls = counted(monkeypatch)
    with afa.adapters_of(layer, names):
        layer(torch.randn(len(names), 4, 12))
    assert calls == wanted


def test_reaching_identity_costs_no_call(monkeypatch):
    layer = stack_of(adapters={"a": {}, "b": {"activation": "tanh"}}, alphas={"a": 0.5, "b": 0.5})
    calls = counted(monkeypatch)
    for value, wanted in ((0.5, 2), (0.0, 1)):
        calls.clear()
        layer.set_alpha_t(value, "b")
        with afa.adapters_of(layer, ["a", "b"]):
            layer(torch.randn(2, 12))
        assert len(calls) == wanted


def test_dropout_is_that_of_each_adapter_and_acts_in_training():
    layer = stack_of(adapters={"a": {"dropout": 0.5}, "b": {}}, alphas={"a": 0.5, "b": 0.5})
    x, names = torch.randn(4, 12), ["b", "a", "b", "a"]
    with afa.adapters_of(layer, names):
        torch.manual_seed(3)
        y = layer(x)
        layer.eval()
        without = layer(x)
    torch.manual_seed(3)
    seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    assert torch.equal(y[::2], without[::2]), "b has none"
    ordered = x[[0, 2, 1, 3]]  # as the rows stand in the call
    branch = layer.adapters["a"]
    dropped = mask_and_p(0.5, seed, ordered)
    wanted = eager(ordered, branch.lora_a, branch.lora_b, 0.5, scaling=2.0, **dropped)[2:]
    torch.testing.assert_close(y[1::2], layer.base_layer(x[1::2]) + wanted)
    assert not torch.allclose(y[1::2], without[1::2])


def test_float64_keeps_the_scaling_of_each_adapter():
    layer = stack_of(nn.Linear(12, 10, dtype=torch.float64), {"a": {"r": 3, "lora_alpha": 1}, "b": {"r": 7}}, {})
    x = torch.randn(2, 12, dtype=torch.float64)
    with afa.adapters_of(layer, ["a", "b"]):
        y = layer(x)
    for i, branch in enumerate(layer.adapters.values()):
        wanted = eager(x[i], branch.lora_a, branch.lora_b, 1.0, scaling=branch.scaling, base=layer.base_layer(x[i]))
        torch.testing.assert_close(y[i], wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("hooked", [False, True])
def test_autocast_and_inference_mode(hooked):
    base = nn.Linear(12, 10)
    if hooked:
        base.register_forward_hook(lambda *_: None)
    layer, x, names = stack_of(base), torch.randn(4, 3, 12), ["c", "a", "__base__", "c"]
    with afa.adapters_of(layer, names):
        wanted = layer(x)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)
        y.float().sum().backward()
    assert layer.adapters["a"].lora_a.grad.dtype == torch.float32


def test_contexts_nest_and_end():
    layer, x = stack_of(), torch.randn(2, 12)
    with afa.adapters_of(layer, "a"):
        outer = layer(x)
        with afa.adapters_of(layer, "b"):
            assert not torch.equal(layer(x), outer)
        assert torch.equal(layer(x), outer)
        with pytest.raises(RuntimeError, match="stop"), afa.adapters_of(layer, "c"):
            raise RuntimeError("stop")
        assert torch.equal(layer(x), outer)
    with pytest.raises(ValueError, match="which of the adapters a, b, c, d computes which sample is not said"):
        layer(x)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "x"], ValueError, "names: the model has no adapter 'x'; it has a, b, c, d"),
        (["a"], ValueError, r"one for each of the 2 samples, or of the 6 rows, of x \(2, 3, 12\), got 1"),
        (["a", 1], TypeError, "names: expected names of adapters, got 1"),
        (None, TypeError, "names: expected a name for each sample, or one name for all, got None"),
    ],
)
def test_names_that_do_not_fit(names, error, message):
    layer = stack_of()
    with pytest.raises(error, match=message), afa.adapters_of(layer, names):
        layer(torch.randn(2, 3, 12))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "x: expected a torch.Tensor, got list"),
        (torch.zeros(()), r"x: expected shape \(..., in_features\)"),
        (torch.zeros(2, 11), r"to match x \(2, 11\)"),
        (torch.zeros(2, 12, dtype=torch.float64), "float64, the dtype of x"),
        (torch.zeros(2, 12, dtype=torch.int64), "x: expected"),
    ],
)
def test_what_is_no_input_is_named(x, message):
    layer = stack_of()
    with pytest.raises((TypeError, ValueError), match=message), afa.adapters_of(layer, ["a", "__base__"]):
        layer(x)


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "keys", 3, "a"])
def test_what_cannot_be_the_name_of_an_adapter(name):
    layer = stack_of()
    with pytest.raises((TypeError, ValueError), match="name: "):
        layer.add_adapter(name)
    assert list(layer.adapters) == list(ADAPTERS)


def test_second_derivatives():
    layer = stack_of(nn.Linear(12, 10, dtype=torch.float64))
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    with afa.adapters_of(layer, ["a", "b", "a", "c"]):
        assert torch.autograd.gradgradcheck(lambda t: layer(t), x)


def test_experts_and_adapters_in_one_call():
    """An owner is a pair of an expert and an adapter: rows are sorted by expert, and within it by adapter."""
    experts, adapters, r = 3, 2, 4
    counts = torch.tensor([[2, 3], [0, 4], [1, 0]])  # rows of each adapter in each expert
    offsets = counts.flatten().cumsum(0).to(torch.int32)
    x = torch.randn(10, 12)
    weight = torch.randn(experts, 10, 12)
    lora_a, lora_b = torch.randn(experts, adapters, r, 12), torch.randn(experts, adapters, 10, r)
    alpha_t, scaling = torch.tensor([0.5, 1.0]), torch.tensor([2.0, 0.5])
    base = torch.cat([rows @ w.T for rows, w in zip(x.split(counts.sum(1).tolist()), weight, strict=True)])
    y = afa.afa_lora(
        x, lora_a.flatten(0, 1), lora_b.flatten(0, 1), alpha_t.repeat(experts), offsets=offsets,
        scaling=scaling.repeat(experts), base=base,
    )  # fmt: skip
    pairs = [(e, a) for e in range(experts) for a in range(adapters) for _ in range(int(counts[e, a]))]
    for row, (expert, adapter) in enumerate(pairs):
        own = slice(row, row + 1)
        wanted = afa.afa_lora(
            x[own], lora_a[expert, adapter], lora_b[expert, adapter], float(alpha_t[adapter]),
            scaling=float(scaling[adapter]), base=base[own],
        )  # fmt: skip
        torch.testing.assert_close(y[own], wanted)


def test_what_a_captured_graph_reads_is_kept(monkeypatch):
    """Its constants outlive those that are dropped where there are too many. The CPU stands for the GPU here."""
    monkeypatch.setattr(mixed, "_constants", {})
    monkeypatch.setattr(mixed, "_of_graphs", {}, raising=False)
    tensor, capturing, here = torch.tensor, False, (torch.int32, torch.device("cuda"))
    monkeypatch.setattr(torch, "tensor", lambda values, **_: tensor(values))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    before = mixed.constant((1, 2), *here)
    capturing = True
    assert mixed.constant((1, 2), *here) is before
    capturing = False
    for number in range(5000):
        mixed.constant((number,), *here)
    assert mixed.constant((1, 2), *here) is before and len(mixed._constants) < 4096
