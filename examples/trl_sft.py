"""AFA-LoRA with TRL's SFTTrainer: a configuration and a callback, the rest is TRL.

    python examples/trl_sft.py [--steps 40] [--output outputs/trl_sft]

A small Llama with random weights and a tokenizer made of the words of the data, so that this runs without a network.
Needs ``pip install 'afa-kernels[hf]'``. DPO and GRPO take the same two arguments.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig

SENTENCES = ["the quick brown fox jumps over the lazy dog", "a lazy dog sleeps under the brown tree"] * 16


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Yours: ``AutoTokenizer.from_pretrained(...)``."""
    words = ["<pad>", "<eos>", "<unk>", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def base_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Yours: ``AutoModelForCausalLM.from_pretrained(...)``."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (40)")
    parser.add_argument("--output", type=Path, default=Path("outputs/trl_sft"), help="folder of what is written")
    arguments = parser.parse_args()

    tokenizer = word_tokenizer()
    trainer = SFTTrainer(
        base_model(tokenizer),
        args=SFTConfig(
            str(arguments.output / "run"),
            max_steps=arguments.steps,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            logging_steps=10,
            report_to="none",
            bf16=False,
            seed=0,
        ),  # fmt: skip
        train_dataset=Dataset.from_dict({"text": SENTENCES}),
        processing_class=tokenizer,
        peft_config=AFALoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, activation="gelu"),
        callbacks=[AnnealCallback()],  # alpha_t: 1 -> 0 over the first 80% of the steps, logged beside the loss
    )
    trainer.train()

    # alpha_t is 0 now: the adapter is an ordinary LoRA, which any PEFT loads, and it merges into the weights.
    trainer.save_model(str(arguments.output / "adapter"))
    trainer.model.merge_and_unload().save_pretrained(arguments.output / "merged")
    print(f"adapter/ and merged/ in {arguments.output}")


if __name__ == "__main__":
    main()
