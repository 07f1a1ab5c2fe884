"""GRPO of an AFA-LoRA adapter whose rollouts come from vLLM while alpha_t > 0.

    python examples/trl_grpo_vllm.py [--steps 8] [--bf16] [--output outputs/trl_grpo_vllm] [--server URL]

A small Llama with random weights is rewarded for low numbers, on a CPU in a minute. For each step it prints alpha_t and
the gap: how far the log-probabilities of the sampled tokens lie apart between vLLM and the model that trains, in nats.
Needs vLLM and TRL in one environment (docs/vllm.md).
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig
from afa_kernels.vllm.trl import GRPOTrainer

NUMBERS = [str(n) for n in range(32)]


def number_tokenizer() -> PreTrainedTokenizerFast:
    """Yours: ``AutoTokenizer.from_pretrained(...)``."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *NUMBERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def save_base(folder: Path) -> None:
    """Yours is on the hub or on disk already: vLLM loads the base model from there by itself."""
    torch.manual_seed(0)
    tokenizer = number_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def low_numbers(completions: list[str], **_) -> list[float]:
    """The share of the words that are numbers below 8."""
    return [sum(word in NUMBERS[:8] for word in text.split()) / max(1, len(text.split())) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps (8)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16, in which vLLM computes then")
    parser.add_argument("--output", type=Path, default=Path("outputs/trl_grpo_vllm"), help="folder of what is written")
    parser.add_argument("--server", metavar="URL", help="a vLLM that serves OUTPUT/base (default: one in this process)")
    arguments = parser.parse_args()

    base = arguments.output / "base"
    if not base.exists():
        save_base(base)
    where = {"vllm_mode": "server", "vllm_server_base_url": arguments.server} if arguments.server else {}
    trainer = GRPOTrainer(
        LlamaForCausalLM.from_pretrained(base),
        reward_funcs=low_numbers,
        args=GRPOConfig(
            str(arguments.output / "run"),
            max_steps=arguments.steps,
            learning_rate=2e-2,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=8,
            logging_steps=1,
            report_to="none",
            bf16=arguments.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=0,
            use_vllm=True,
            vllm_max_model_length=32,
            vllm_gpu_memory_utilization=0.3,
            **where,
        ),  # fmt: skip
        train_dataset=Dataset.from_dict({"prompt": [" ".join(NUMBERS[i : i + 4]) for i in range(16)]}),
        processing_class=number_tokenizer(),
        peft_config=AFALoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, activation="silu"),
        callbacks=[AnnealCallback()],
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            gap, alpha_t = entry["sampling/sampling_logp_difference/max"], entry["alpha_t"]
            print(f"step {entry['step']}: reward {entry['reward']:.3f}, alpha_t then {alpha_t:.3f}, gap {gap:.1e}")


if __name__ == "__main__":
    main()
