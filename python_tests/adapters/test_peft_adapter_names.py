"""PEFT's ``adapter_names`` in training: one batch for many adapters, each with its own step."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("peft")

from hf_models import llama, token_rows
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from peft_models import TARGETS, Net, assert_same, fill_adapters
from torch.utils.checkpoint import CheckpointError, checkpoint

import afa_kernels as afa
from adapters.test_peft_adapter import PASSES_CONFIG, config
from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig, accelerate, install_annealed, restore
from afa_kernels.peft.tuner import AFALoraModel

NAMES = ["b", "a", "__base__", "c", "a", "plain", "b"]
ADAPTERS = {
    "a": {"r": 4, "activation": "silu"},
    "b": {"r": 8, "activation": "silu", "lora_alpha": 3},
    "c": {"r": 2, "activation": "tanh", "use_rslora": True},
}


def mixed(net=None, *, plain=True, more=(), **options):
    """Return a model in training with the annealed adapters a, b, c, all of them active, and a plain one."""
    model = get_peft_model(Net() if net is None else net, config(**ADAPTERS["a"] | options), adapter_name="a")
    for name in ("b", "c"):
        model.add_adapter(name, config(**ADAPTERS[name] | options))
    if plain:
        model.add_adapter("plain", config(LoraConfig, r=3))
    for name, kind in more:
        model.add_adapter(name, kind)
    if not PASSES_CONFIG:
        accelerate(model)
    model.base_model.set_adapter(list(model.peft_config))
    install_annealed(model)
    for name, value in (("a", 0.5), ("b", 1.0), ("c", 0.25)):
        afa.set_alpha_t(model, value, name)
    return fill_adapters(model).train()


def step(model, x, names, dy):
    """Return y, dx and the gradient of each adapter parameter that has one."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x, adapter_names=names)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def rows_of(names, name):
    return [i for i, other in enumerate(names) if other == name]


@pytest.mark.parametrize("order", [NAMES, sorted(NAMES)], ids=["mixed", "sorted"])
def test_a_mixed_step_equals_separate_steps(order):
    """Of the adapters of this package to the bit where the frozen weight, whose GEMM sees other rows, is 0."""
    model = mixed()
    layer = model.base_model.model.q_proj
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    x, dy = torch.randn(7, 3, 16), torch.randn(7, 3, 24)

    def of_layer(rows, names):
        return step_of_layer(layer, x[rows], names, dy[rows])

    together = of_layer(range(7), order)
    for name in ADAPTERS:
        rows = rows_of(order, name)
        alone = of_layer(rows, [name] * len(rows))
        assert torch.equal(together["y"][rows], alone["y"]) and torch.equal(together["dx"][rows], alone["dx"]), name
        own = {key for key in alone if f".{name}." in key}
        assert own == alone.keys() - {"y", "dx"} and len(own) == 2, "the others have no gradient"
        assert all(torch.equal(together[key], alone[key]) for key in own), name


def step_of_layer(layer, x, names, dy):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, adapter_names=list(names))
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [False, True], ids=["", "lora-bias"])
def test_a_model_trains_each_adapter_as_if_alone(bias):
    """Against PEFT's way: one adapter is active, and its samples are the batch."""
    model = mixed(lora_bias=bias)
    x, dy = torch.randn(7, 16), torch.randn(7, 3)
    together = step(model, x, NAMES, dy)
    for name in (*ADAPTERS, "plain"):
        single, rows = copy.deepcopy(model), rows_of(NAMES, name)
        single.set_adapter(name)
        leaf = x[rows].requires_grad_()
        single.zero_grad()
        y = single(leaf)
        y.backward(dy[rows])
        own = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
        wanted = {"y": y.detach(), "dx": leaf.grad} | {n: g for n, g in own.items() if f".{name}." in n}
        got = {"y": together["y"][rows], "dx": together["dx"][rows]}
        assert_same(got | {n: together[n] for n in wanted if n not in got}, wanted)


def test_a_layer_with_hooks_or_a_view_for_its_output_is_not_written():
    """As quantized layers have it; PEFT's own layer may return a view of a buffer."""
    model = mixed()
    layer, x = model.base_model.model.q_proj, torch.randn(7, 3, 16)
    wanted = layer(x, adapter_names=NAMES)
    seen = []
    layer.base_layer.register_forward_hook(lambda _m, _x, y: seen.append((y, y.clone())) or y.view(y.shape))
    torch.testing.assert_close(layer(x, adapter_names=NAMES), wanted)
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "x"], ValueError, "'?x'?"),
        (["a"], ValueError, "adapter_names|names: expected one"),
        ("ab", TypeError, "adapter_names: expected the name of an adapter for each sample, got 'ab'"),
    ],
    ids=["unknown", "number", "string"],
)
def test_names_that_do_not_fit(names, error, message, training):
    if not training and names == "ab":
        pytest.skip("PEFT takes the letters for names")
    model = mixed().train(training)
    x = torch.randn(2, 16)
    wanted = model(x)
    with pytest.raises(error, match=message):
        model(x, adapter_names=names)
    if training:
        assert torch.equal(model(x), wanted), "no hook of the failed call is left"


def test_names_are_refused_while_an_adapter_is_merged():
    model = mixed(plain=False)
    for name in ADAPTERS:
        afa.set_alpha_t(model, 0.0, name)
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="adapter_names.*merged"):
        model(torch.randn(1, 16), adapter_names=["b"])


def test_the_model_of_peft_comes_back_where_no_layer_is_ours():
    model = accelerate(fill_adapters(get_peft_model(Net(), config(LoraConfig))))
    assert type(model.base_model) is AFALoraModel
    x = torch.randn(2, 16)
    assert model.train()(x, adapter_names=["default", "__base__"]).requires_grad
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    assert all(torch.equal(each(x), model(x)) for each in copies)
    restore(model)
    assert type(model.base_model) is LoraModel
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=["default", "__base__"])


def test_each_adapter_has_its_own_schedule():
    model = mixed()
    of_a = model.peft_config["a"].schedule(4).attach(model, "a")
    of_b = afa.AnnealSchedule(2, end_frac=1.0).attach(model, "b")
    of_a.step()
    of_b.step()
    layer = model.base_model.model.v_proj
    assert {n: s.alpha_t for n, s in layer.lora_afa.items()} == {"a": of_a.alpha_t, "b": 0.5, "c": 0.25}
    assert model.peft_config["b"].alpha_t == 0.5 and model.peft_config["c"].alpha_t == 0.25
    assert layer.schedule(10, "b").total_steps == 10 and layer.schedule(10, "plain") is None
    for name in ("plain", "x"):
        with pytest.raises(ValueError, match=f"has an adapter '{name}' that can be annealed"):
            of_a.attach(model, name)
        with pytest.raises(ValueError, match=f"'{name}' is no annealed adapter of this layer"):
            layer.set_alpha_t(0.5, name)


def llama_with(*names, **options):
    kinds = {name: AFALoraConfig(target_modules=list(TARGETS), r=4, task_type="CAUSAL_LM", **options) for name in names}
    model = get_peft_model(llama(), kinds[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, kinds[name])
    model.base_model.set_adapter(list(names))
    install_annealed(model)
    return fill_adapters(model).train()


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", "a", "a"]], ids=["mixed", "one"])
def test_a_model_that_recomputes_by_itself_is_noticed(names):
    model = mixed()
    y = checkpoint(lambda x: model(x, adapter_names=names), torch.randn(3, 16), use_reentrant=False)
    y.sum().backward()  # the whole call is recomputed, with its names
    inner = model.base_model.model
    layer, forward = inner.q_proj, inner.q_proj.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    model(torch.randn(3, 16), adapter_names=names).sum().backward()  # the names are among what is recomputed
    del layer.forward
    inner_forward = inner.forward
    inner.forward = lambda x: checkpoint(inner_forward, x, use_reentrant=False)
    late = model(torch.randn(3, 16), adapter_names=names).sum()
    with pytest.raises(CheckpointError):
        late.backward()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_trainer_trains_several_adapters_each_with_its_callback(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = llama_with("a", "b", "c", anneal_end_frac=1.0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{**row, "adapter_names": "ab"[i % 2]} for i, row in enumerate(token_rows())]

    def collate(samples):
        tensors = {key: torch.tensor([s[key] for s in samples]) for key in ("input_ids", "labels")}
        return {**tensors, "adapter_names": [s["adapter_names"] for s in samples]}

    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, remove_unused_columns=False, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    callbacks = [AnnealCallback(adapter="a"), AnnealCallback(adapter="b", end_frac=0.5)]
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    logged = [(e["alpha_t/a"], e["alpha_t/b"]) for e in trainer.state.log_history if "loss" in e]
    assert logged == [(0.75, 0.5), (0.5, 0.0), (0.25, 0.0), (0.0, 0.0)]
    moved = {n.split(".")[-2] for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {"a", "b"} and model.peft_config["c"].alpha_t == 1.0
