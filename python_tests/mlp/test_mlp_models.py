"""The MLP block in real models: transformers' by structure, PEFT's layers, and shards."""

import copy
import weakref

import pytest
import torch
import torch.distributed as dist
from adapters.quantized_models import DEQUANTIZED, made
from mlp_helpers import MLP, K, assert_equal, fused, pair, step  # noqa: F401
from peft_models import fill_adapters
from torch import nn

import afa_kernels as afa
from afa_kernels.callbacks.annealer import Annealer
from afa_kernels.model import mlp as blocks
from afa_kernels.operator.quantized_weight import QuantizedWeight

SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 32}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}
LINEAR = ["gate_proj", "up_proj", "down_proj"]


def transformer(name: str, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    return getattr(transformers, f"{name}Model")(config)


def hidden_states(model: nn.Module) -> dict:
    """Return the last hidden state of a fixed text, and the gradient of each trained parameter."""
    model.zero_grad()
    out = model(torch.arange(10).view(2, 5)).last_hidden_state
    out.square().sum().backward()
    return {"y": out} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "activation", "options"),
    [
        ("Llama", "silu", {"mlp_bias": True}),
        ("Qwen2", "silu", {}),
        ("Qwen3", "silu", {}),
        ("Mistral", "silu", {}),
        ("Gemma", "gelu_tanh", {"head_dim": 8}),
        ("Llama", "gelu", {"hidden_act": "gelu"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mlps_of_real_models(fused, name, activation, options, dtype):  # noqa: F811
    parts = transformer(name, **options).to(dtype)
    block = copy.deepcopy(parts)
    keys = list(afa.inject(parts, r=2).state_dict())
    afa.inject(block, r=2, fuse_mlp=True)
    assert list(block.state_dict()) == keys and repr(block) == repr(parts)
    for model in (parts, block):
        afa.set_alpha_t(fill_adapters(model), 0.5)
    assert_equal(hidden_states(block), hidden_states(parts))
    assert fused == [activation] * 2
    parts.gradient_checkpointing_enable()
    block.gradient_checkpointing_enable()
    assert_equal(hidden_states(block.train()), hidden_states(parts.train()))
    assert len(fused) == 6
    block.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    for model in (parts, block):
        model.layers[1].mlp.act_fn = nn.Tanh()
    assert_equal(hidden_states(block), hidden_states(parts))
    assert len(fused) == 6


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Phi3", {"pad_token_id": 0}, "no module has three linear layers"),
        ("GPT2", {}, "no module has three linear layers"),
        ("Llama", {"hidden_act": "relu"}, r"layers.0.mlp: it computes no act\(gate\) \* up"),
    ],
)
def test_other_mlps_are_left_alone_with_a_reason(name, options, reason):
    model = transformer(name, **options)
    with pytest.raises(ValueError, match=f"fuse_mlp: nothing to fuse in {name}Model: {reason}"):
        afa.inject(model, fuse_mlp=True)
    afa.inject(model)
    layers = model.h if name == "GPT2" else model.layers
    wanted = "it computes no act" if name == "Llama" else "it has 2 linear layers as children, not three"
    assert wanted in afa.plan_mlp(layers[0].mlp, torch.randn(1, 16)).reason


# --- PEFT


def peft_pair(config, **options):
    peft = pytest.importorskip("peft")
    base = transformer("Llama")
    made = [peft.get_peft_model(copy.deepcopy(base), config, **options) for _ in range(2)]
    return [fill_adapters(model) for model in made]


def test_accelerate_fuses_plain_lora_and_restore_ends_it(fused):  # noqa: F811
    peft = pytest.importorskip("peft")
    from afa_kernels.peft import accelerate, restore

    parts, block = peft_pair(peft.LoraConfig(r=2, target_modules=LINEAR))
    stock = hidden_states(parts)
    keys = list(block.state_dict())
    accelerate(parts)
    assert accelerate(block, fuse_mlp=True) is block and list(block.state_dict()) == keys
    want = hidden_states(parts)
    assert_equal(hidden_states(block), want)
    assert len(fused) == 2
    accelerate(block)
    hidden_states(block)
    assert len(fused) == 4
    with block.disable_adapter(), parts.disable_adapter():
        ids = torch.arange(5).view(1, 5)
        assert torch.equal(block(ids).last_hidden_state, parts(ids).last_hidden_state)
    merged = copy.deepcopy(block)
    merged.merge_adapter()
    merged(ids)
    assert len(fused) == 4
    restore(block)
    assert not any(isinstance(m, blocks.FusedMLP) for m in block.modules())
    assert_equal(hidden_states(block), stock)
    assert len(fused) == 4
    attention = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(transformer("Llama"), attention)
    with pytest.raises(ValueError, match="fuse_mlp: nothing to fuse in .*gate_proj is not adapted"):
        accelerate(model, fuse_mlp=True)
    assert not any(hasattr(m, "lora_afa") for m in model.modules())


def test_an_afa_lora_config_fuses_once_its_model_is_driven(fused, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    from afa_kernels.peft import AFALoraConfig, load_adapter

    config = AFALoraConfig(r=2, target_modules=LINEAR, fuse_mlp=True)
    parts, block = peft_pair(config)
    Annealer(None, "force", False, {}).begin(block, 10, 0)
    afa.set_alpha_t(block, 0.5)
    afa.set_alpha_t(parts, 0.5)
    afa.unfuse_mlp(parts)
    assert_equal(hidden_states(block), hidden_states(parts))
    assert len(fused) == 2
    block.save_pretrained(tmp_path)
    assert not any("fuse_mlp" in file.read_text() for file in tmp_path.glob("*.json"))
    load_adapter(block, tmp_path, "other", is_trainable=True)
    block.set_adapter("other")
    assert torch.equal(hidden_states(block)["y"], hidden_states(parts)["y"])
    assert len(fused) == 4
    block.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="gate_proj is sharded, or its base layer or its adapters have to be called"):
        hidden_states(block)
    assert len(fused) == 4
    unloaded = block.unload()
    want = transformer("Llama")(torch.arange(5).view(1, 5)).last_hidden_state
    assert torch.equal(unloaded(torch.arange(5).view(1, 5)).last_hidden_state, want)
    with pytest.raises(TypeError, match="fuse_mlp: expected True or False, got str"):
        AFALoraConfig(fuse_mlp="yes")


# --- shards


@pytest.fixture
def one_process():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


fsdp2 = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="FSDP2 of torch before 2.9 is not for the CPU"
)


@fsdp2
def test_fsdp2_around_a_block_leaves_it_one(fused, one_process):  # noqa: F811
    parts, block = pair()
    dist.fsdp.fully_shard(block[0], mesh=one_process)
    x = torch.randn(5, K)
    assert_equal(step(block, x), step(parts, x))
    assert len(fused) == 1


@fsdp2
@pytest.mark.filterwarnings("ignore:fuse_mlp")
def test_fsdp2_around_layers_and_tensor_parallelism_run_the_parts(fused, one_process):  # noqa: F811
    from torch.distributed.tensor.parallel import parallelize_module

    from afa_kernels.parallel import ColwiseAFA, RowwiseAFA

    x = torch.randn(5, K)
    parts, block = pair()
    want = parts(x)
    for layer in (block[0].w1, block[0].w3, block[0].w2):
        dist.fsdp.fully_shard(layer, mesh=one_process)
    assert torch.equal(block(x), want)
    _, block = pair()
    styles = {"w1": ColwiseAFA(), "w3": ColwiseAFA(), "w2": RowwiseAFA()}
    parallelize_module(block[0], one_process, styles)
    torch.testing.assert_close(block(x), want)
    assert "w1 is sharded" in afa.plan_mlp(block[0], x).reason and not fused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", DEQUANTIZED)
def test_quantized_layers(fused, kind, monkeypatch):  # noqa: F811
    """Each weight is dequantized twice, and one at a time, as those of the parts are; the trial repacks none."""
    alive, original = [], QuantizedWeight.dense

    def dense(weight, dtype):
        assert not alive or alive[-1]() is None
        made = original(weight, dtype)
        alive.append(weakref.ref(made))
        return made

    models = []
    for fuse_mlp in (False, True):
        torch.manual_seed(0)
        models.append(model := nn.Sequential(made(kind, MLP(64, 128).requires_grad_(False), names=("w1", "w2", "w3"))))
        afa.inject(model, r=4, fuse_mlp=fuse_mlp)
        afa.set_alpha_t(fill_adapters(model), 0.5)
    parts, block = models
    want = step(parts, x := torch.randn(40, 64))
    monkeypatch.setattr(QuantizedWeight, "dense", dense)
    assert_equal(step(block, x), want)
    assert fused == ["silu"] and len(alive) == 6
    assert afa.plan_mlp(block[0], x).path == "block"
    with torch.profiler.profile():  # operators that are watched take tensors: each layer by itself
        watched = step(block, x)
    for name, value in want.items():
        torch.testing.assert_close(watched[name], value, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    (dx,) = torch.autograd.grad(block(x.requires_grad_()).square().sum(), x, create_graph=True)
    assert dx.square().sum().backward() is None and x.grad.abs().max() > 0
    with torch.no_grad():
        assert afa.plan_mlp(block[0], x[:4]).path == "parts"
        torch.testing.assert_close(block(x)[:4], block(x[:4]), rtol=1e-3, atol=1e-3)


def test_the_trial_of_a_module_records_gradients():
    """Called with an x that needs none, bitsandbytes may bring a 4-bit weight into a layout that gives x none."""
    seen = []

    class Recording(nn.Linear):
        def forward(self, x):
            seen.append(x.requires_grad and torch.is_grad_enabled())
            return super().forward(x)

    net = MLP()
    net.w1, net.w3 = (Recording(K, net.w2.in_features) for _ in range(2))
    with torch.no_grad():
        afa.inject(nn.Sequential(net), fuse_mlp=True)
    assert seen and all(seen)
