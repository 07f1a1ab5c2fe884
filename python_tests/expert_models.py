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


def fill(model: nn.Module, seed: int = 1) -> nn.Module:
    """Draw every A and B anew: with B = 0 any branch is right."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def routing(experts: nn.Module, tokens: int, top_k: int = 2) -> tuple[Tensor, Tensor]:
    """Return experts and weights of tokens; at least one expert has no token."""
    index = torch.stack([torch.randperm(experts.num_experts - 1)[:top_k] for _ in range(tokens)])
    return index, torch.rand(tokens, top_k)
