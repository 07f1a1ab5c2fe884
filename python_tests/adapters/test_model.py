"""inject, set_alpha_t, merge, unmerge and unload over whole models."""

import copy

import pytest
import torch
from torch import nn

import afa_kernels as afa
from afa_kernels.model.adapted import named_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.value = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.value(torch.tanh(self.query(x))))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.pooler = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.classifier(torch.tanh(self.pooler(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier().eval()


def wake(model):
    """Give every branch a B that is not 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in named_layers(model):
            layer.lora_b.normal_(std=0.2)
    return model


def names(model):
    return [name for name, _ in named_layers(model)]


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def llama(tied=False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ).eval()


BLOCK_LAYERS = ["blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value"]


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["query"], ["blocks.0.query", "blocks.1.query"]),
        (["0.query", "pooler"], ["blocks.0.query", "pooler"]),
        (("query", "value"), BLOCK_LAYERS),
        (r"blocks\.\d\.(query|value)", BLOCK_LAYERS),
        (r".*1\.query", ["blocks.1.query"]),
        ("all-linear", [*BLOCK_LAYERS, "pooler"]),
        ("ALL-LINEAR", [*BLOCK_LAYERS, "pooler"]),
    ],
    ids=str,
)
def test_targets(model, target_modules, expected):
    x = torch.randn(5, 8)
    before = model(x)
    assert afa.inject(model, target_modules, r=2) is model
    assert names(model) == expected
    assert trainable(model) == {f"{n}.{p}" for n in expected for p in ("lora_a", "lora_b")}
    torch.testing.assert_close(model(x), before)


def test_targets_mean_what_they_mean_to_peft():
    peft = pytest.importorskip("peft")
    for make in (llama, gpt2):
        for targets in ("all-linear", ["q_proj", "up_proj", "c_attn"], r".*\.1\..*(k_proj|c_fc)"):
            ours = names(afa.inject(make(), targets))
            wrapped = peft.get_peft_model(make(), peft.LoraConfig(target_modules=targets))
            theirs = [
                name.removeprefix("base_model.model.")
                for name, m in wrapped.named_modules()
                if isinstance(m, peft.tuners.lora.LoraLayer)
            ]
            assert ours == theirs


def test_names_match_whole_components(model):
    model.requery = nn.Linear(8, 8)
    assert names(afa.inject(model, ["query"])) == ["blocks.0.query", "blocks.1.query"]


def test_options_reach_the_layers(model):
    afa.inject(
        model, ["query"], r=3, lora_alpha=6, activation="gelu", dropout=0.1, use_rslora=True,
        dtype=torch.float64, backend="torch",
    )  # fmt: skip
    layer = model.blocks[0].query
    assert (layer.r, layer.lora_alpha, layer.activation, layer.dropout) == (3, 6, "gelu", 0.1)
    assert layer.use_rslora and layer.scaling == pytest.approx(6 / 3**0.5)
    assert layer.lora_a.dtype == torch.float64
    assert layer.backend == "torch"
    assert not layer.training  # as the base was


def test_trainable_modules_train_in_full_and_are_not_adapted(model):
    afa.inject(model, "all-linear", trainable=["pooler", "classifier"])
    assert names(model) == BLOCK_LAYERS
    in_full = {f"{n}.{p}" for n in ("pooler", "classifier") for p in ("weight", "bias")}
    assert trainable(model) >= in_full
    assert trainable(model) - in_full == {f"{n}.lora_{x}" for n in BLOCK_LAYERS for x in "ab"}


def test_excluded_modules_are_left(model):
    afa.inject(model, "all-linear", exclude_modules=["value"])
    assert names(model) == ["blocks.0.query", "blocks.1.query", "pooler"]


def test_all_linear_leaves_the_output_head():
    transformers = pytest.importorskip("transformers")
    assert not [n for n in names(afa.inject(llama())) if "lm_head" in n]
    assert len(names(afa.inject(llama()))) == 14
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    assert "classifier" not in names(afa.inject(bert))
    # Asked for by name, an untied head is a layer like any other.
    assert names(afa.inject(llama(), ["lm_head"])) == ["lm_head"]


def test_conv1d_of_gpt2():
    model = gpt2()
    ids = torch.randint(0, 40, (2, 5))
    before = model(ids).logits
    afa.inject(model)
    assert len(names(model)) == 8 and model.transformer.h[0].attn.c_attn.transposed
    torch.testing.assert_close(model(ids).logits, before)
    wake(model)
    afa.set_alpha_t(model, 0.0)
    annealed = model(ids).logits
    assert not torch.allclose(annealed, before)
    torch.testing.assert_close(afa.merge(model)(ids).logits, annealed, atol=1e-5, rtol=1e-5)


# --- refusals, each with the model unchanged ------------------------------------------------------


def refused(model, error, match, *args, **kwargs):
    before = [(n, id(m)) for n, m in model.named_modules()], trainable(model)
    with pytest.raises(error, match=match):
        afa.inject(model, *args, **kwargs)
    assert ([(n, id(m)) for n, m in model.named_modules()], trainable(model)) == before


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "'quary'.*query, value, pooler", {"target_modules": ["quary"]}),
        (ValueError, "nothing_like_it.*blocks.0.query", {"target_modules": "nothing_like_it"}),
        (ValueError, "regular expression", {"target_modules": "blocks.("}),
        (TypeError, "target_modules.*int", {"target_modules": 3}),
        (TypeError, "target_modules.*names", {"target_modules": [3]}),
        (TypeError, "blocks.0.norm cannot be adapted.*LayerNorm", {"target_modules": ["norm"]}),
        (ValueError, "trainable.*score", {"trainable": ["score"]}),
        (ValueError, "matches no layer", {"target_modules": ["pooler"], "trainable": ["pooler"]}),
        (ValueError, "r: ", {"r": 0}),
        (ValueError, "activation", {"activation": "elu"}),
        (TypeError, "dtype", {"dtype": torch.int8}),
    ],
)
def test_wrong_arguments_are_named(model, error, match, arguments):
    refused(model, error, match, **arguments)


def test_injecting_twice_is_refused(model):
    afa.inject(model, ["query"])
    refused(model, ValueError, "already", ["value"])


def test_a_tied_weight_is_refused_with_a_reason():
    model = llama(tied=True)
    refused(model, ValueError, "lm_head cannot be adapted.*tied to.*embed_tokens", ["lm_head"])
    assert "lm_head" not in names(afa.inject(model))


def test_a_module_at_two_places_is_refused_with_a_reason():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(8, 8))})
    refused(model, ValueError, "a.0 cannot be adapted.*also registered as b.0", ["0"])
    assert names(afa.inject(model)) == ["b.1"]


def test_a_shared_container_is_no_obstacle():
    block = Block()
    model = nn.ModuleDict({"a": block, "b": block})
    afa.inject(model, ["query"])
    assert model["a"].query is model["b"].query and isinstance(model["b"].query, afa.AFALinear)


def test_a_linear_layer_alone_is_pointed_to_the_layer():
    refused(nn.Linear(8, 8), ValueError, r"AFALinear\(model\)")
    refused(nn.Sequential(nn.ReLU()), ValueError, "no layer that can be adapted")


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


def test_attention_that_reads_weights_is_refused():
    refused(encoder(), ValueError, "self_attn.out_proj.*MultiheadAttention", ["out_proj"])


@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_encoder_of_torch_does_not_skip_the_branches(padded):
    model = afa.inject(encoder())
    assert [n.rpartition(".")[2] for n in names(model)] == ["linear1", "linear2"] * 2
    wake(model)
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padded else None
    with_grad = model(x, src_key_padding_mask=mask)  # never takes the fused path
    with torch.no_grad():
        without_grad = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(without_grad, with_grad)
    plain = encoder()
    with torch.no_grad():
        assert not torch.allclose(plain(x), model(x), atol=1e-3)
    afa.unload(model)
    assert model.use_nested_tensor == plain.use_nested_tensor
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)


# --- anneal, merge, unload ------------------------------------------------------------------------


@pytest.mark.parametrize("action", [lambda m: afa.set_alpha_t(m, 0.0), afa.merge, afa.unmerge, afa.unload])
def test_a_model_without_layers_is_refused(model, action):
    with pytest.raises(ValueError, match="inject"):
        action(model)


def test_a_merge_whose_sum_a_weight_does_not_take_changes_no_layer(model, monkeypatch):
    wake(afa.inject(model))
    afa.set_alpha_t(model, 0.0)
    last = names(model)[-1]
    weight = model.get_submodule(last).weight
    before = copy.deepcopy(model.state_dict())
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, other: t if t is weight else copy_(t, other))
    with pytest.raises(RuntimeError, match=f"{last}: merge.*does not hold the sum"):
        afa.merge(model, keep_original=True)
    assert not any(layer.merged for _, layer in named_layers(model))
    assert all(layer._original_weight is None for _, layer in named_layers(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    monkeypatch.undo()
    afa.merge(model)


def test_unload_after_merge_keeps_what_was_learned(model):
    plain = copy.deepcopy(model)
    wake(afa.inject(model, trainable=["classifier"]))
    afa.set_alpha_t(model, 0.0)
    x = torch.randn(5, 8)
    annealed = model(x)
    afa.merge(model)
    merged = model(x)
    assert afa.unload(model) is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert torch.equal(model(x), merged)
    torch.testing.assert_close(model(x), annealed)
    assert model.state_dict().keys() == plain.state_dict().keys()
    afa.inject(model)  # and it can be injected again


def test_unload_of_a_half_merged_model_is_refused(model):
    wake(afa.inject(model))
    afa.set_alpha_t(model, 0.0)
    model.blocks[0].query.merge()
    with pytest.raises(ValueError, match="blocks.0.value is not"):
        afa.unload(model)
    assert len(names(model)) == 5


def test_training_anneals_and_learns(model):
    """The whole path: train while alpha_t falls to 0, merge, and lose nothing."""
    torch.manual_seed(0)
    afa.inject(model, r=4, trainable=["classifier"])
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    sched = afa.AnnealSchedule(60).attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(96, 8)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sched.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert sched.alpha_t == 0.0
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    logits = model(x)
    torch.testing.assert_close(afa.unload(afa.merge(model))(x), logits, atol=1e-4, rtol=1e-4)
