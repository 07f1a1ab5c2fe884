"""Adapters by name on the experts of a mixture: a row belongs to a pair of an expert and an adapter."""

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("safetensors")

from expert_models import PARAMETERS, copy_of, fill, mixture, routing, tokens
from helpers import allowed_error, relative_error

import afa_kernels as afa
from adapters.test_experts import Largest, call, experts_of, run
from adapters.test_linear_stack import counted
from afa_kernels.layers import mixed
from afa_kernels.model.adapted import named_layers

ADAPTERS = {
    "ann": {"r": 3, "lora_alpha": 5},
    "bob": {"r": 5, "activation": "tanh", "use_rslora": True},
    "cy": {"r": 2, "activation": "relu"},
    "eve": {"r": 4, "lora_alpha": 1},
    "idle": {},
}
ALPHAS = {"ann": 0.4, "bob": 0.7, "cy": 0.0, "eve": 0.9}
USED = tuple(ALPHAS)
NAMES = ["bob", "ann", "__base__", "cy", "ann", "eve"]


def stacked(base=None, modules=None, adapters=ADAPTERS, alphas=ALPHAS, **options):
    base = mixture() if base is None else base
    model = fill(afa.inject(base, modules, target_parameters=PARAMETERS, adapters=adapters, **options))
    for name, value in alphas.items():
        afa.set_alpha_t(model, value, name)
    return model


def alone(base, model, name, modules=None):
    """Return a model that has one adapter of ``model``, without a name."""
    single = afa.inject(base, modules, target_parameters=PARAMETERS, **ADAPTERS[name])
    of_stacks = dict(named_layers(model, name))
    with torch.no_grad():
        for where, layer in named_layers(single):
            layer.lora_a.copy_(of_stacks[where].lora_a)
            layer.lora_b.copy_(of_stacks[where].lora_b)
    afa.set_alpha_t(single, ALPHAS[name])
    return single


def rows_of(name):
    return [i for i, other in enumerate(NAMES) if other == name]


def step(model, ids, dy):
    """Return the logits and the gradients of one step by the names of their parameters."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.backward(dy.to(logits.dtype))
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | named


@pytest.mark.parametrize("modules", [None, ["q_proj", "o_proj"]], ids=["experts", "both kinds"])
@pytest.mark.parametrize("architecture", ["Qwen3Moe", "GptOss"])
def test_a_mixed_step_is_the_steps_of_models_with_one_adapter(architecture, modules):
    def base(dtype):
        return mixture(architecture, experts_implementation="eager").to(dtype)  # torch's grouped_mm has no float64

    ids, dy = tokens(len(NAMES), 6), torch.randn(len(NAMES), 6, 32)
    together, separate = {}, {}
    for dtype in (torch.float32, torch.float64):
        model = stacked(base(dtype), modules)
        with afa.adapters_of(model, NAMES):
            together[dtype] = step(model, ids, dy)
        assert not any(".idle." in name for name in together[dtype])
        separate[dtype] = {}
        for name in USED:
            rows = rows_of(name)
            for what, value in step(alone(base(dtype), model, name, modules), ids[rows], dy[rows]).items():
                where, _, half = what.rpartition(".")
                own = f"{where}.adapters.{name}.{half}" if where else f"logits {name}"
                separate[dtype][own] = value
            together[dtype][f"logits {name}"] = together[dtype]["logits"][rows]
        free = rows_of("__base__")
        separate[dtype]["logits free"] = base(dtype)(ids[free]).logits.detach()
        together[dtype]["logits free"] = together[dtype].pop("logits")[free]
    truth = separate[torch.float64]
    assert together[torch.float64].keys() == truth.keys()
    assert len(truth) == 5 + 4 * 2 * 2 * (2 if modules is None else 4)
    for what, exact in truth.items():
        assert relative_error(together[torch.float64][what], exact) < 1e-12, what
    # All of them come through the same chain of products, whose error depends on the order of sums.
    got, plain, exact = (
        torch.cat([results[what].flatten() for what in truth])
        for results in (together[torch.float32], separate[torch.float32], truth)
    )
    assert relative_error(got, exact) <= allowed_error(plain, exact, torch.float32)


def of_tokens(t, name, each=3):
    return t.unflatten(0, (len(NAMES), each))[rows_of(name)].flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["Qwen3Moe", "GptOss"])
def test_the_branches_have_the_bits_of_separate_steps(architecture, dtype, monkeypatch):
    """The frozen weights are 0, for the rounding of their products may depend on the number of rows. So may that of
    torch's sigmoid: a value is a part of a vector or of what is left over."""

    def base():
        model = mixture(architecture).to(dtype)
        with torch.no_grad():
            for parameter in ("gate_up_proj", "down_proj"):
                getattr(experts_of(model), parameter).zero_()
        return model

    model = stacked(base())
    experts = experts_of(model)
    monkeypatch.setattr(type(experts), "_apply_gate", lambda _experts, rows: rows[..., ::2] * rows[..., 1::2])
    index, weights = routing(experts, 18)
    inputs = [torch.randn(18, 16, dtype=dtype), index, weights.to(dtype), torch.randn(18, 16, dtype=dtype)]
    with afa.adapters_of(experts, NAMES):
        got = run(call, experts, *inputs)
    for name in USED:
        own = [of_tokens(t, name) for t in inputs]
        with afa.adapters_of(experts, name):
            separate = run(call, experts, *own)
        single = run(call, experts_of(alone(base(), model, name)), *own)
        for what in ("y", "dx", "dweights"):
            assert torch.equal(of_tokens(got[what], name), separate[what]), (name, what)
            assert torch.equal(separate[what], single[what]), (name, what)
        for parameter in ("gate_up_proj", "down_proj"):
            for half in ("lora_a", "lora_b"):
                what = f"afa.{parameter}.adapters.{name}.{half}"
                assert got[what].any() and torch.equal(got[what], separate[what]), what
                assert torch.equal(got[what], single[f"afa.{parameter}.{half}"]), what
                assert not got[what][-1].any(), "an expert without tokens"
    assert not any(".idle." in what for what in got)


def test_one_call_for_one_activation(monkeypatch):
    experts = experts_of(stacked(adapters={"a": {"r": 2}, "b": {}, "c": {"activation": "tanh"}}, alphas={}))
    inputs = torch.randn(6, 16), *routing(experts, 6)
    calls = counted(monkeypatch)
    for names, wanted in (
        (["a", "b", "__base__"], ["afa_linear"] * 2),
        (["c", "b"], ["afa_linear", "afa_lora"] * 2),
        ("__base__", []),
    ):
        calls.clear()
        with afa.adapters_of(experts, names):
            experts(*inputs)
        # Tokens go to their experts in any case.
        assert [call for call in calls if call != "permute"] == wanted


def test_one_adapter_alone_is_not_copied():
    for branch in (experts_of(stacked()).afa["down_proj"].adapters["ann"], afa.AFALinear(torch.nn.Linear(12, 10))):
        (only,) = mixed.passes_of(torch.randn(6, 12), [branch.call()])
        assert all(only[half].data_ptr() == getattr(branch, half).data_ptr() for half in ("lora_a", "lora_b"))


@pytest.mark.parametrize("names", [["a"] * 6, list("abcabc")], ids=["one", "several"])
def test_no_tensor_as_large_as_all_experts_is_made(names):
    base = mixture(num_experts=16, moe_intermediate_size=48, hidden_size=64)
    experts = experts_of(stacked(base, adapters={"a": {"r": 2}, "b": {"r": 1}, "c": {"r": 2}}, alphas={}))
    x = torch.randn(6, 64, requires_grad=True)
    inputs = x, *routing(experts, 6)
    with Largest() as largest, afa.adapters_of(experts, names):
        experts(*inputs).sum().backward()
    assert 0 < largest.elements < experts.down_proj.numel() // 4


def test_names_may_be_given_for_tokens_or_for_all():
    model, ids = stacked(), tokens(2, 5)
    with afa.adapters_of(model, ["ann", "bob"]):
        want = model(ids).logits
    with afa.adapters_of(model, ["ann"] * 5 + ["bob"] * 5):
        assert torch.equal(model(ids).logits, want)
    for row, name in enumerate(("ann", "bob")):
        with afa.adapters_of(model, name):
            torch.testing.assert_close(model(ids).logits[row], want[row])
    experts = experts_of(model)
    for names in ("ann", [], ["ann", "bob"]):
        with afa.adapters_of(model, names):
            assert experts(torch.zeros(0, 16), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 16)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ann", "x"], "names: the model has no adapter 'x'; it has ann, bob, cy, eve, idle"),
        (["ann"] * 3 + ["bob"], r"one for each of the 2 samples, or of the 12 rows, of x \(2, 6, 16\), got 4"),
        (["ann"] * 4, "one for each of the 2 samples, .*got 4"),
    ],
)
def test_names_that_do_not_fit_a_batch(names, message):
    model = stacked()
    with pytest.raises(ValueError, match=message), afa.adapters_of(model, names):
        model(tokens(2, 6))


def test_names_that_do_not_fit_tokens_or_are_not_said():
    experts = experts_of(stacked())
    inputs = torch.randn(9, 16), *routing(experts, 9)
    for names in (["ann", "bob"], ["ann", "ann"], []):
        with pytest.raises(ValueError, match=f"equally long, of 9 tokens, got {len(names)}"):
            with afa.adapters_of(experts, names):
                experts(*inputs)
    with pytest.raises(
        ValueError, match="which of the adapters ann, bob, cy, eve, idle computes which sample is not said"
    ):
        experts(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": {"a.b": {}}}, "name: 'a.b' cannot be the name of an adapter"),
        ({"adapters": {"a": {"r": 0}}}, "adapters: 'a': r: expected a rank of at least 1"),
        ({"target_parameters": ["down_proj.weight"]}, "matches no parameter"),
    ],
)
def test_what_does_not_fit_leaves_the_model(options, message):
    model = mixture()
    with pytest.raises(ValueError, match=message):
        afa.inject(model, **{"target_parameters": PARAMETERS, "adapters": {"a": {}}} | options)
    assert all(p.requires_grad for p in model.parameters())


def test_experts_that_are_split_between_processes_are_refused(tmp_path):
    afa.save_adapter(stacked(alphas={"ann": 0.0}), tmp_path, "ann")
    model = mixture()
    experts_of(model)._is_expert_parallel = True
    for action in (
        lambda: afa.inject(model, target_parameters=PARAMETERS, adapters={"a": {}}),
        lambda: afa.load_adapter(model, tmp_path, "ann"),
        lambda: afa.AFAExpertStack(experts_of(model), "down_proj", {"a": {}}),
    ):
        with pytest.raises(ValueError, match="adapters: expected experts that are whole in each process"):
            action()
    assert all(p.requires_grad for p in model.parameters())


def test_the_rank_of_an_expert_of_each_adapter():
    stack = experts_of(stacked(expert_rank="per_active")).afa["down_proj"]
    assert {name: branch.r for name, branch in stack.adapters.items()} == {
        "ann": 1,
        "bob": 2,
        "cy": 1,
        "eve": 2,
        "idle": 4,
    }
    assert stack.adapters["bob"].lora_a.shape == (5, 2, 12) and stack.adapters["ann"].scaling == 5.0


def test_compiles_once_for_each_list_of_names():
    block = stacked().model.layers[1].mlp  # with the router, and with the check of the names
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for names, wanted in ((NAMES, 1), (["ann", "bob"] * 6, 2)):
        for alpha_t in (0.5, 0.25, 0.75):
            afa.set_alpha_t(block, alpha_t, "ann")
            x = torch.randn(len(NAMES), 2, 16, requires_grad=True)
            with afa.adapters_of(block, names):
                torch.testing.assert_close(compiled(x), block(x))
                compiled(x).sum().backward()
        assert counter.frame_count == wanted


# --- checkpoints


@pytest.mark.filterwarnings("error::UserWarning:peft")
@pytest.mark.parametrize("architecture", ["Qwen3Moe", "GptOss"])
def test_stock_peft_loads_one_of_them_and_gives_it_back(architecture, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.19")
    base, ids = mixture(architecture), tokens(3)
    model = stacked(copy_of(base), ["q_proj", "o_proj"], alphas=ALPHAS | {"bob": 0.0})
    with afa.adapters_of(model, "bob"):
        want = model(ids).logits
    afa.save_adapter(model, tmp_path / "bob", "bob")
    stock = peft.PeftModel.from_pretrained(copy_of(base), str(tmp_path / "bob")).eval()
    torch.testing.assert_close(stock(ids).logits, want)
    stock.save_pretrained(tmp_path / "stock")
    afa.load_adapter(model, tmp_path / "stock", "again")
    fresh = afa.load_adapter(copy_of(base), tmp_path / "stock", "mine")
    for each, name in ((model, "again"), (fresh, "mine")):
        with afa.adapters_of(each, name):
            assert torch.equal(each(ids).logits, want)


def test_an_adapter_is_loaded_over_the_one_that_is_there(tmp_path):
    base, ids = mixture(), tokens(3)
    model = stacked(copy_of(base))
    with pytest.warns(UserWarning, match="saved at alpha_t = 0.7"):
        afa.save_adapter(model, tmp_path, "bob")
    with afa.adapters_of(model, "bob"):
        want = model(ids).logits.detach()
        with torch.no_grad():
            experts_of(model).afa["down_proj"].adapters["bob"].lora_b.zero_()
        afa.load_adapter(model, tmp_path, "bob")
        assert torch.equal(model(ids).logits, want)
    with pytest.raises(ValueError, match="was saved with r=5, the model's layer has 3"):
        afa.load_adapter(model, tmp_path, "ann")
    for message, other in (
        (
            "cannot be loaded: no such layer in the model has a stack",
            afa.inject(copy_of(base), "all-linear", adapters={"a": {}}),
        ),
        ("have one adapter, without a name", afa.inject(copy_of(base), target_parameters=PARAMETERS)),
    ):
        with pytest.raises(ValueError, match=message):
            afa.load_adapter(other, tmp_path, "bob")


def test_an_adapter_of_one_parameter(tmp_path):
    """Beside the other parameter, and in layers that it lacks, it is the frozen model."""
    base, ids = mixture(), tokens(3)
    small = fill(afa.inject(copy_of(base), target_parameters=["layers.1.mlp.experts.down_proj"], r=2))
    afa.set_alpha_t(small, 0.0)
    afa.save_adapter(small, tmp_path)
    model = afa.load_adapter(stacked(copy_of(base)), tmp_path, "small")
    assert [name for name, _ in named_layers(model, "small")] == ["model.layers.1.mlp.experts.down_proj"]
    with afa.adapters_of(model, "small"):
        torch.testing.assert_close(model(ids).logits, small(ids).logits)
    with afa.adapters_of(model, ["ann", "small", "__base__"]):
        logits = model(ids).logits
        torch.testing.assert_close(logits[1:2], small(ids[1:2]).logits)
        logits.sum().backward()
    assert len([name for name, p in model.named_parameters() if p.grad is not None and ".small." in name]) == 2
