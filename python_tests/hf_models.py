"""A tiny causal language model with a tokenizer and data, made without a network."""

import torch
from torch import Tensor, nn

VOCABULARY = 32
SPECIAL = ("<pad>", "<eos>", "<unk>")
WORDS = [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]


def llama(seed: int = 0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def vocabulary():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary(), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def sentences(n: int = 16, length: int = 6) -> list[str]:
    return [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(length)) for i in range(n)]


def token_rows(n: int = 16, length: int = 8) -> list[dict[str, list[int]]]:
    """Return a dataset for transformers.Trainer."""
    first = len(SPECIAL)
    rows = [[first + (i + j) % len(WORDS) for j in range(length)] for i in range(n)]
    return [{"input_ids": row, "labels": row} for row in rows]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(torch.arange(3, 19)[None]).logits


def assert_merges(model: nn.Module, base: nn.Module) -> nn.Module:
    """Check that ``model`` has learned something and that merging changes nothing; return it
    merged."""
    trained = logits(model)
    assert not torch.allclose(trained, logits(base), atol=1e-4), "nothing was learned"
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(logits(merged), trained)
    return merged
