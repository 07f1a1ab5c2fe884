"""Models with a stack of adapters in each layer: inject, schedules, recomputation in the backward, checkpoints."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import afa_kernels as afa
from adapters.test_linear_stack import filled
from adapters.test_model import Classifier, llama
from afa_kernels.callbacks.annealer import Annealer
from afa_kernels.model.adapted import named_layers

ADAPTERS = {"a": {"r": 4}, "b": {"r": 2, "activation": "tanh", "lora_alpha": 4}}
LAYERS = ["blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return filled(afa.inject(Classifier(), ["query", "value"], adapters=ADAPTERS), {})


def alphas(model):
    return {name: branch.alpha_t for name, branch in model.blocks[0].query.adapters.items()}


def gradients(model, compute):
    model.zero_grad()
    compute().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert torch.equal(value, wanted[name]), name


def test_inject_makes_stacks(model):
    assert isinstance(model.blocks[1].value, afa.AFALinearStack)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.adapters.{name}.lora_{half}" for layer in LAYERS for name in "ab" for half in "ab"
    }
    branches = model.blocks[0].query.adapters
    assert (branches["a"].r, branches["a"].activation, branches["a"].scaling) == (4, "silu", 4.0)
    assert (branches["b"].r, branches["b"].activation, branches["b"].scaling) == (2, "tanh", 2.0)
    x = torch.randn(2, 5, 8)
    with afa.adapters_of(model, ["b", "a"]):
        y = model(x)
    for i, name in enumerate("ba"):
        with afa.adapters_of(model, name):
            torch.testing.assert_close(model(x[i : i + 1]), y[i : i + 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": {}}, "adapters: expected the options of each adapter by its name"),
        ({"adapters": {"a": {"rank": 4}}}, "adapters: 'a' has rank; expected some of r, lora_alpha"),
        ({"adapters": {"a": {}, "b": {"r": 0}}}, "adapters: 'b': r: expected a rank of at least 1, got 0"),
        ({"adapters": {"a.b": {}}}, "name: 'a.b' cannot be the name of an adapter"),
        ({"adapters": {"a": {}}, "share_inputs": True}, "share_inputs: layers with a stack of adapters"),
    ],
)
def test_inject_refuses(options, message):
    model = Classifier()
    with pytest.raises((TypeError, ValueError), match=message):
        afa.inject(model, ["query"], **options)
    assert type(model.blocks[0].query) is nn.Linear


def test_a_model_has_one_kind_of_layers(model):
    with pytest.raises(ValueError, match="it has AFA layers already"):
        afa.inject(model, ["pooler"])
    plain = afa.inject(Classifier(), ["query"])
    for action in (lambda: afa.adapters_of(plain, "a").__enter__(), lambda: afa.add_adapter(plain, "a")):
        with pytest.raises(ValueError, match=r"found none in Classifier; inject\(model, adapters=...\) makes them"):
            action()
    with pytest.raises(ValueError, match="no layer of Classifier has an adapter 'a' that can be annealed"):
        afa.set_alpha_t(plain, 0.5, "a")
    for action in (afa.merge, afa.unmerge):
        with pytest.raises(ValueError, match="no weight equals several branches"):
            action(model)


def test_adapters_come_and_go(model):
    assert afa.add_adapter(model, "c", r=3) is model
    with pytest.raises(ValueError, match="the model has an adapter 'c' already"):
        afa.add_adapter(model, "c")
    with pytest.raises(TypeError, match="r: expected a positive int"):
        afa.add_adapter(model, "d", r="3")
    afa.delete_adapter(model, "b")
    assert [list(m.adapters) for m in model.modules() if isinstance(m, afa.AFALinearStack)] == [["a", "c"]] * 4
    with pytest.raises(ValueError, match="no adapter 'b'; it has a, c"):
        afa.delete_adapter(model, "b")


def test_one_schedule_may_drive_two_adapters(model):
    afa.add_adapter(model, "c")
    schedule = afa.AnnealSchedule(2, end_frac=1.0).attach(model, "a").attach(model, "b")
    schedule.step()
    assert alphas(model) == {"a": 0.5, "b": 0.5, "c": 1.0}


def test_an_annealer_of_one_adapter_leaves_the_others(model):
    annealer = Annealer(None, "force", False, {"end_frac": 1.0}, "b")
    annealer.begin(model, 4, 0)
    annealer.set_step(1)
    assert alphas(model) == {"a": 1.0, "b": 0.75} and annealer.key == "alpha_t/b"
    with pytest.warns(UserWarning, match="it was set to 0"):
        annealer.end("stopped")
    assert alphas(model) == {"a": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match="merge: the layers have other adapters than 'b'"):
        Annealer(None, "force", True, {}, "b")
    with pytest.raises(ValueError, match="has an adapter 'x'"):
        Annealer(None, "force", False, {}, "x").begin(model, 4, 0)


def test_a_model_that_recomputes_by_itself_needs_its_backward_in_the_context(model):
    x = torch.randn(2, 8)

    def loss():
        return checkpoint(model, x, use_reentrant=False).sum()

    with afa.adapters_of(model, ["a", "b"]):
        wanted = gradients(model, lambda: model(x).sum())
        assert_equal(gradients(model, loss), wanted)
        late = loss()
    with pytest.raises((ValueError, CheckpointError), match="not said"):
        late.backward()


def test_compiled():
    torch._dynamo.reset()
    layer = filled(afa.AFALinearStack(nn.Linear(12, 10), ADAPTERS), {"a": 0.5})
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(3, 12)
    for names in (["a", "b", "a"], "a"):
        with afa.adapters_of(layer, names):
            wanted = gradients(layer, lambda: layer(x).square().sum())
            got = gradients(layer, lambda: compiled(x).square().sum())
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], msg=name)


def logits(model, x, name=None):
    with torch.no_grad():
        if name is None:
            return model(x)
        with afa.adapters_of(model, name):
            return model(x)


def test_an_adapter_is_loaded_over_the_one_that_is_there(model, tmp_path):
    pytest.importorskip("safetensors")
    x = torch.randn(2, 5, 8)
    afa.set_alpha_t(model, 0.5, "b")
    wanted = logits(model, x, "b")
    with pytest.raises(ValueError, match="adapter: the model has a, b; expected the name of one"):
        afa.save_adapter(model, tmp_path / "none")
    with pytest.raises(ValueError, match="the model has no adapter 'x'; it has a, b"):
        afa.save_adapter(model, tmp_path / "none", "x")
    with pytest.warns(UserWarning, match="saved at alpha_t = 0.5"):
        afa.save_adapter(model, tmp_path / "b", "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["target_modules"] == sorted(LAYERS)

    with torch.no_grad():
        model.blocks[0].query.adapters["b"].lora_b.zero_()
    afa.set_alpha_t(model, 0.0, "b")
    afa.load_adapter(model, tmp_path / "b", "b")
    assert torch.equal(logits(model, x, "b"), wanted), "over the one that is there"


def test_what_cannot_be_loaded_leaves_the_model(model, tmp_path):
    pytest.importorskip("safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        afa.save_adapter(model, tmp_path / "b", "b")
        afa.save_adapter(filled(afa.inject(Classifier(), ["pooler"]), {}), tmp_path / "pooler")
    for path, name, message in (
        ("b", "a", "was saved with r=2, the model's layer has 4"),
        ("b", None, "adapter: the model has a, b; expected the name of one"),
        ("b", "a.b", "cannot be the name of an adapter"),
        ("pooler", "new", "pooler.*cannot be loaded: no such layer in the model"),
    ):
        with pytest.raises(ValueError, match=message):
            afa.load_adapter(model, tmp_path / path, name)
    assert [name for name, _ in named_layers(model, "a")] == LAYERS and not list(named_layers(model, "new"))
    with pytest.raises(ValueError, match="have one adapter, without a name; got 'b'"):
        afa.load_adapter(afa.inject(Classifier(), ["query"]), tmp_path / "b", "b")


def test_an_adapter_of_some_layers(model, tmp_path):
    """The others compute it as the frozen model."""
    pytest.importorskip("safetensors")
    small = filled(afa.inject(Classifier(), ["blocks.0.query"], r=3), {})
    afa.set_alpha_t(small, 0.0)
    afa.save_adapter(small, tmp_path)
    afa.load_adapter(model, tmp_path, "small")
    assert [name for name, _ in named_layers(model, "small")] == ["blocks.0.query"]
    names = ["a", "small", "__base__"]
    grads = {}
    with afa.adapters_of(model, names):
        grads = gradients(model, lambda: model(torch.randn(3, 8)).sum())
    assert {name for name in grads if ".small." in name} == {
        f"blocks.0.query.adapters.small.lora_{half}" for half in "ab"
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trainer_whose_loss_is_computed_in_the_context(tmp_path):
    transformers = pytest.importorskip("transformers")
    from afa_kernels.callbacks import AnnealCallback

    model = filled(afa.inject(llama(), adapters={**ADAPTERS, "c": {}}), {})
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": list(range(i, i + 6)), "name": "ab"[i % 2]} for i in range(16)]

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with afa.adapters_of(model, inputs.pop("names")):
                return super().compute_loss(model, inputs, *args, **kwargs)

    def collate(samples):
        ids = torch.tensor([sample["input_ids"] for sample in samples])
        return {"input_ids": ids, "labels": ids, "names": [sample["name"] for sample in samples]}

    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False, report_to="none",
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    callbacks = [AnnealCallback(adapter="a", end_frac=0.5), AnnealCallback(adapter="b", end_frac=1.0)]
    Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=callbacks).train()
    moved = {name.split(".")[-2] for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"a", "b"}
    layer = model.model.layers[0].mlp.up_proj
    assert {name: branch.alpha_t for name, branch in layer.adapters.items()} == {"a": 0.0, "b": 0.0, "c": 1.0}
