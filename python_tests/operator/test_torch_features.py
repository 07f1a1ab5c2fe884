"""What torch offers around a model works with AFA layers in it: a whole small transformer, made
from a configuration."""

import copy
import io

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_as_accurate_as_torch, eager
from torch import nn

import afa_kernels as afa

transformers = pytest.importorskip("transformers")

VOCABULARY = 48
SHARING = pytest.mark.parametrize("share_inputs", [False, True], ids=["separate", "shared"])


def llama(layers=2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(layers=2, **options) -> nn.Module:
    model = afa.inject(llama(layers), r=4, **options)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model


def ids() -> torch.Tensor:
    return torch.arange(14).view(2, 7) % VOCABULARY


def loss_and_gradients(model, seed=2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads and all("lora" in name for name in grads)
    return loss.detach(), grads


def assert_same(got, want) -> None:
    torch.testing.assert_close(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 cannot trace the forward of transformers' models")
@SHARING
def test_a_whole_model_compiles_once_while_it_anneals(share_inputs):
    model = adapted(layers=1, share_inputs=share_inputs)
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    schedules = [afa.AnnealSchedule(5, end_frac=0.6).attach(m) for m in (model, plain)]
    frames = []
    for _ in range(5):
        model.zero_grad()
        loss = compiled(input_ids=ids(), labels=ids()).loss
        loss.backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert_same((loss.detach(), got), loss_and_gradients(plain))
        frames.append(counter.frame_count)
        for schedule in schedules:
            schedule.step()
    assert frames == [1, 1, 1, 2, 2]  # identity, from step 3 on, is the one other graph


@SHARING
def test_autocast(share_inputs, monkeypatch):
    model = adapted(share_inputs=share_inputs)
    _, truth = loss_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, got = loss_and_gradients(model)
        monkeypatch.setattr(afa.AFALinear, "forward", in_plain_torch)
        _, plain = loss_and_gradients(model)
    for name in truth:
        assert_as_accurate_as_torch(got[name], plain[name], truth[name].double(), name, torch.bfloat16)


def in_plain_torch(layer, x):
    base = layer.base_layer
    return eager(
        x, layer.lora_a, layer.lora_b, layer.alpha_t, activation=layer.activation,
        scaling=layer.scaling, weight=base.weight, bias=base.bias,
    )  # fmt: skip


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"share_inputs": True}], ids=["dropout", "shared"])
def test_gradient_checkpointing(options, reentrant):
    """With dropout the gradients agree only if the recomputation draws the same masks."""
    model = adapted(**options).train()
    model.enable_input_require_grads()  # the embedding is frozen, and reentrant needs a gradient
    want = loss_and_gradients(model)
    # transformers 5 has a new name for it.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    assert_same(loss_and_gradients(model), want)
    if "dropout" in options:
        other = loss_and_gradients(model, seed=3)
        assert not torch.equal(other[0], want[0])


@SHARING
def test_functional_call(share_inputs):
    model = adapted(share_inputs=share_inputs)
    parameters = {n: p.detach() * 2 for n, p in model.named_parameters() if p.requires_grad}
    arguments = ((), {"input_ids": ids(), "labels": ids()})
    got = torch.func.functional_call(model, parameters, *arguments).loss
    before = model(**arguments[1]).loss
    model.load_state_dict(parameters, strict=False)
    torch.testing.assert_close(got, model(**arguments[1]).loss)
    assert not torch.equal(got, before)


def pickled(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@SHARING
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_train_alone(duplicate, share_inputs):
    model = adapted(share_inputs=share_inputs)
    afa.set_alpha_t(model, 0.25)
    want = loss_and_gradients(model)
    other = duplicate(model)
    assert_same(loss_and_gradients(other), want)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    afa.set_alpha_t(other, 0.0)
    assert_same(loss_and_gradients(model), want)


@SHARING
def test_state_dict(share_inputs):
    model = adapted(share_inputs=share_inputs)
    afa.set_alpha_t(model, 0.25)
    state = copy.deepcopy(model.state_dict())
    fresh = afa.inject(llama(), r=4)
    fresh.load_state_dict(state)
    assert_same(loss_and_gradients(fresh), loss_and_gradients(model))


@SHARING
def test_export_of_a_merged_model(share_inputs):
    model = adapted(share_inputs=share_inputs).eval()
    afa.set_alpha_t(model, 0.0)
    with torch.no_grad():
        unmerged = model(ids()).logits
        merged = afa.merge(model)(ids()).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids).logits

    exported = torch.export.export(Logits(), (ids(),), strict=False)
    assert not any("afa_kernels" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(ids()), merged)


@SHARING
def test_construction_on_the_meta_device(share_inputs):
    model = adapted(share_inputs=share_inputs).eval()
    afa.set_alpha_t(model, 0.25)
    state = model.state_dict()
    with torch.no_grad():
        want = model(ids()).logits
    with torch.device("meta"):
        skeletons = [afa.inject(llama(), r=4, share_inputs=share_inputs).eval() for _ in range(2)]
    assert all(p.is_meta for m in skeletons for p in m.parameters())
    # The buffers of the rotary embedding are in no state dict: what a loader has to make anew.
    rotary = copy.deepcopy(model.model.rotary_emb)
    assigned, emptied = skeletons
    assigned.load_state_dict(state, assign=True)
    emptied.to_empty(device="cpu").load_state_dict(state)
    for other in skeletons:
        other.model.rotary_emb = copy.deepcopy(rotary)
        layers = [m for m in other.modules() if isinstance(m, afa.AFALinear)]
        assert {m.alpha_t for m in layers} == {0.25}
        assert {m.alpha_t_buffer.device.type for m in layers} == {"cpu"}
        with torch.no_grad():
            torch.testing.assert_close(other(ids()).logits, want)
