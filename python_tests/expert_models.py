"""Tiny mixtures of experts with random weights, one for each layout of transformers 5."""

import copy

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0")

VOCABULARY = 32
PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "Qwen3Moe": {**_COMMON, **_GROUPED, "intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 5},
    "Mixtral": {**_COMMON, **_GROUPED, "intermediate_size": 12, "num_local_experts": 4},
    "DeepseekV3": {
        **_COMMON, "intermediate_size": 24, "moe_intermediate_size": 12, "num_key_value_heads": 2,
        "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "GptOss": {
        **_COMMON, **_GROUPED, "intermediate_size": 12, "num_local_experts": 4, "layer_types": ["full_attention"] * 2,
    },
}  # fmt: skip


def mixture(architecture: str = "Qwen3Moe", seed: int = 0, **options) -> nn.Module:
    """Return a model whose experts, routers and biases all differ from zero."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture] | options)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length))


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits and the gradient of every trained parameter."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | named


def assert_checkpointing_recomputes_the_same(model: nn.Module) -> None:
    """Check it with the dropout that the branches of all experts of ``model`` have."""
    ids = tokens()
    model.train()
    torch.manual_seed(5)
    want = gradients(model, ids)
    model.gradient_checkpointing_enable()
    torch.manual_seed(5)
    got = gradients(model, ids)
    assert len(got) == 9 and all(torch.equal(got[name], value) for name, value in want.items())


def fill(model: nn.Module, seed: int = 1) -> nn.Module:
    """Draw every A and B anew: with B = 0 any branch is right."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def in_torch_ops(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The forward of an adapted experts module as a user would write it, one token and one expert at a time."""

    def project(row, parameter, expert):
        weight = getattr(experts, parameter)[expert]
        y = row @ (weight if experts.is_transposed else weight.T)
        if experts.has_bias:
            y = y + getattr(experts, f"{parameter}_bias")[expert]
        if parameter in experts.afa:
            layer = experts.afa[parameter]
            z = row @ layer.lora_a[expert].T.to(row.dtype)
            h = (1 - layer.alpha_t_buffer.item()) * z + layer.alpha_t_buffer.item() * nn.functional.silu(z)
            y = y + layer.scaling * h @ layer.lora_b[expert].T.to(row.dtype)
        return y

    tokens = []
    for token in range(x.shape[0]):
        outputs = []
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert < experts.num_experts:
                gated = experts._apply_gate(project(x[token][None], "gate_up_proj", expert))
                outputs.append(weight * project(gated, "down_proj", expert)[0])
        tokens.append(sum(outputs, torch.zeros_like(x[token])))
    return torch.stack(tokens)


def routing(experts: nn.Module, tokens: int, top_k: int = 2) -> tuple[Tensor, Tensor]:
    """Return experts and weights of tokens; at least one expert has no token."""
    index = torch.stack([torch.randperm(experts.num_experts - 1)[:top_k] for _ in range(tokens)])
    return index, torch.rand(tokens, top_k)
