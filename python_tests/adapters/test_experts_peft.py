"""AFALoraConfig(target_parameters=...): PEFT's wrappers of fused experts, computed by the operator."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("peft", minversion="0.19")

import torch._dynamo.testing
from expert_models import (
    ARCHITECTURES,
    PARAMETERS,
    copy_of,
    fill,
    gradients,
    mixture,
    tokens,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft_models import assert_same

import afa_kernels as afa
from afa_kernels.peft import AFALoraConfig, accelerate, add_activation, restore
from afa_kernels.peft.experts import ParamWrapper


def config(cls=AFALoraConfig, **options):
    return cls(**{"target_parameters": list(PARAMETERS), "target_modules": [], "r": 3, "lora_alpha": 5} | options)


def adapted(net, configuration, seed=1):
    return fill(get_peft_model(copy_of(net), configuration), seed).eval()


def wrappers(model):
    return [m for m in model.modules() if isinstance(m, ParamWrapper)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_identity_it_is_peft_lora(architecture):
    net, ids = mixture(architecture), tokens()
    ours, stock = adapted(net, config()), adapted(net, config(LoraConfig))
    afa.set_alpha_t(ours, 0.0)
    assert_same(gradients(ours, ids), gradients(stock, ids))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert str(wrappers(ours)[0]).splitlines()[1] == "  parameter_name='down_proj',"


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": [PARAMETERS[0]]},
        {"target_parameters": [PARAMETERS[1]]},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 11}},
    ],
    ids=["up", "down", "modules", "patterns"],
)
def test_options_of_peft(options):
    net, ids = mixture(), tokens()
    ours, stock = adapted(net, config(**options)), adapted(net, config(LoraConfig, **options))
    afa.set_alpha_t(ours, 0.0)
    assert_same(gradients(ours, ids), gradients(stock, ids))


@pytest.mark.parametrize(
    "options, ranks",
    [
        ({"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 11}}, (3, 2)),
        ({"rank_pattern": {"down_proj": 2, "experts.gate_up_proj": 4}, "target_modules": ["q_proj"]}, (4, 2)),
        ({"target_modules": ["gate_proj", "up_proj", "down_proj"], "target_parameters": None}, (6, 3)),
    ],
    ids=["patterns", "both", "names of transformers 4"],
)
def test_patterns_of_parameters_are_not_said_to_be_ignored(options, ranks, tmp_path):
    """PEFT 0.21 looks for the keys of patterns among modules only, and warns of those that matched parameters. It
    writes such patterns itself: what transformers 4 called gate_proj and up_proj is one parameter of twice the rank."""
    net = mixture()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*did not match any targeted module")
        model = get_peft_model(copy_of(net), config(**options))
        model.add_adapter("other", config(**options))
        afa.set_alpha_t(model, 0.0)
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(copy_of(net), str(tmp_path), config=AFALoraConfig.from_pretrained(str(tmp_path)))
    for name in ("default", "other"):
        assert tuple(sorted({w.parameter_name: w.r[name] for w in wrappers(model)}.items())) == (
            ("down_proj", ranks[1]), ("gate_up_proj", ranks[0])
        )  # fmt: skip


def test_a_pattern_that_matches_nothing_is_said_to_be_ignored():
    pytest.importorskip("peft", minversion="0.21")
    with pytest.warns(RuntimeWarning, match="did not match any targeted module.*'experts.dwon_proj'"):
        get_peft_model(copy_of(mixture()), config(rank_pattern={"experts.down_proj": 2, "experts.dwon_proj": 4}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_an_activation_it_is_what_inject_makes(architecture, tmp_path):
    net, ids = mixture(architecture), tokens()
    ours = adapted(net, config(activation="tanh"))
    afa.set_alpha_t(ours, 0.0)
    ours.save_pretrained(tmp_path)
    injected = afa.load_adapter(copy_of(net), tmp_path)
    for m in injected.modules():
        if isinstance(m, afa.AFAExpertLinear):
            m.activation = "tanh"
    for model in (ours, injected):
        afa.set_alpha_t(model, 0.4)
    got, want = gradients(ours, ids), gradients(injected, ids)
    assert torch.equal(got["logits"], want["logits"])
    assert len(got) == len(want)
    norms = [sorted(t.norm().item() for name, t in g.items() if "lora" in name) for g in (got, want)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoints_load_in_stock_peft_and_back(architecture, tmp_path):
    net, ids = mixture(architecture), tokens()
    ours = adapted(net, config(lora_dropout=0.1))
    afa.set_alpha_t(ours, 0.0)
    ours.save_pretrained(tmp_path / "ours")
    stock = PeftModel.from_pretrained(copy_of(net), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(stock(ids).logits, ours(ids).logits)
    stock.save_pretrained(tmp_path / "stock")
    back = PeftModel.from_pretrained(
        copy_of(net), str(tmp_path / "stock"), config=AFALoraConfig.from_pretrained(str(tmp_path / "stock"))
    ).eval()
    assert len(wrappers(back)) == len(wrappers(ours))
    torch.testing.assert_close(back(ids).logits, ours(ids).logits)


def test_a_scaling_that_is_a_tensor():
    """PEFT makes it one where adapters are to be swapped in a compiled model."""
    model, ids = adapted(mixture(), config()), tokens()
    want = gradients(model, ids)
    for wrapper in wrappers(model):
        wrapper.scaling["default"] = torch.tensor(wrapper.scaling["default"])
    assert_same(gradients(model, ids), want)


def test_two_active_adapters_add_up_as_in_peft():
    """One of them may be a plain LoRA."""
    net, ids = mixture(), tokens()
    ours, stock = get_peft_model(copy_of(net), config()), get_peft_model(copy_of(net), config(LoraConfig))
    for model in (ours, stock):
        model.add_adapter("other", config(LoraConfig))
        model.base_model.set_adapter(["default", "other"])
        fill(model.eval())
    afa.set_alpha_t(ours, 0.0)
    assert_same(gradients(ours, ids), gradients(stock, ids))


@pytest.mark.filterwarnings("ignore:the weight of .*Router gets a LoRA without an activation")
@pytest.mark.parametrize("architecture", ["Qwen3Moe", "Mixtral"])
def test_all_linear_is_what_it_is_to_peft(architecture, tmp_path):
    """PEFT's "all-linear" adds the fused experts, and the router, which keeps a plain LoRA."""
    pytest.importorskip("peft", minversion="0.20")
    net, ids, targets = mixture(architecture), tokens(), {"target_modules": "all-linear", "target_parameters": None}
    with pytest.warns(UserWarning, match="TopKRouter gets a LoRA without an activation"):
        ours = adapted(net, config(**targets))
    stock, given = (adapted(net, config(LoraConfig, **targets)) for _ in range(2))
    assert len(wrappers(ours)) == 4 and type(ours.base_model.model.model.layers[0].mlp.gate) is lora.ParamWrapper
    assert ours.state_dict().keys() == stock.state_dict().keys()
    add_activation(given, "silu")
    for model in (ours, given):
        afa.set_alpha_t(model, 0.6)
    assert_same(gradients(given, ids), gradients(ours, ids))
    afa.set_alpha_t(ours, 0.0)
    want = gradients(stock, ids)
    assert any("gate.lora_A" in name for name in want)
    assert_same(gradients(ours, ids), want)
    assert_same(gradients(accelerate(stock), ids), want)
    ours.save_pretrained(tmp_path)
    assert_same(gradients(PeftModel.from_pretrained(copy_of(net), tmp_path, is_trainable=True), ids), want)
    again = AFALoraConfig.from_pretrained(tmp_path)
    assert_same(
        gradients(PeftModel.from_pretrained(copy_of(net), tmp_path, config=again, is_trainable=True), ids), want
    )
    torch.testing.assert_close(ours.merge_and_unload()(ids).logits, want["logits"])


@pytest.mark.filterwarnings("ignore:the weight of .*Router gets a LoRA without an activation")
def test_a_router_has_no_dropout_where_the_experts_have():
    pytest.importorskip("peft", minversion="0.20")
    model = adapted(mixture(), config(target_modules="all-linear", target_parameters=None, lora_dropout=0.4)).train()
    torch.manual_seed(0)
    first = model(tokens(), use_cache=False).logits
    assert not torch.equal(first, model(tokens(), use_cache=False).logits)
    assert isinstance(model.base_model.model.model.layers[0].mlp.gate.lora_dropout["default"], torch.nn.Identity)


def test_what_cannot_be_wrapped_is_named():
    for name, module in (("q_proj", "Linear"), ("embed_tokens", "Embedding")):
        with pytest.raises(ValueError, match=f"{module} is not an experts module of transformers 5"):
            adapted(mixture(), config(target_parameters=[f"{name}.weight"]))
    model = adapted(mixture(), config())
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(tokens(), adapter_names=["default", "default"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_adapters_are_taken_over_and_given_back(architecture):
    net, ids = mixture(architecture), tokens()
    stock = adapted(net, config(LoraConfig))
    want = gradients(stock, ids)
    stock.add_adapter("other", config(LoraConfig))
    model = accelerate(copy.deepcopy(stock))
    assert len(wrappers(model)) == len([n for n in want if "lora_A" in n])
    assert_same(gradients(model, ids), want)
    assert (
        not wrappers(restore(model)) and type(model.base_model.model.model.layers[1].mlp.experts) is lora.ParamWrapper
    )
    assert_same(gradients(model, ids), want)
    assert model.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_adapters_can_be_given_an_activation(architecture):
    net, ids = mixture(architecture), tokens()
    options = {"target_modules": ["q_proj", "q_a_proj"]}
    made, given = adapted(net, config(activation="tanh", **options)), adapted(net, config(LoraConfig, **options))
    add_activation(given, "tanh")
    for model in (made, given):
        afa.set_alpha_t(model, 0.4)
    assert_same(gradients(given, ids), gradients(made, ids))
    assert given.state_dict().keys() == made.state_dict().keys()


def test_annealed_adapters_stay_when_others_are_given_back():
    model, ids = adapted(mixture(), config(target_modules=["q_proj"])), tokens()
    want = model(ids).logits
    assert torch.equal(restore(accelerate(model))(ids).logits, want) and len(wrappers(model)) == 4


def test_what_accelerate_cannot_take_over_is_named():
    net = mixture()
    stock = get_peft_model(copy_of(net), config(LoraConfig, target_parameters=["gate.weight"]))
    with pytest.raises(ValueError, match="nothing to run on the kernels .*Router is not an experts module"):
        accelerate(stock)
