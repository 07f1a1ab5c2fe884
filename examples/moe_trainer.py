"""AFA-LoRA on the experts of a Qwen3-MoE with stock Trainer: inject, a callback, a checkpoint that PEFT loads.

    python examples/moe_trainer.py [--steps 60] [--output outputs/moe_trainer]

A small model with random weights learns the bytes of a text, so that this runs without a network. Needs
``pip install 'afa-kernels[hf]'`` with transformers 5.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

import afa_kernels as afa
from afa_kernels.callbacks import AnnealCallback

TEXT = "Each expert of a mixture gets its own A and B, and a token meets those of its experts. " * 40
LENGTH = 64  # bytes in one sample
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base_model() -> Qwen3MoeForCausalLM:
    """Yours: ``AutoModelForCausalLM.from_pretrained(...)``."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (60)")
    parser.add_argument("--output", type=Path, default=Path("outputs/moe_trainer"), help="folder of what is written")
    arguments = parser.parse_args()

    # A token goes through 2 of the 8 experts: with "per_active" each has rank 16 / 2.
    model = base_model()
    afa.inject(model, ["q_proj", "v_proj"], target_parameters=EXPERTS, r=16, expert_rank="per_active", dropout=0.05)
    data = torch.tensor(list(TEXT.encode()))
    rows = [{"input_ids": row, "labels": row} for row in data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.output / "run"),
            max_steps=arguments.steps,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
        callbacks=[AnnealCallback()],  # alpha_t: 1 -> 0 over the first 80% of the steps, logged beside the loss
    )
    trainer.train()

    # alpha_t is 0 now: the adapter is an ordinary LoRA, which stock PEFT loads, and it merges into the weights.
    model.eval()
    afa.save_adapter(model, arguments.output / "adapter")
    ids = rows[0]["input_ids"][None].to(model.device)
    loaded = PeftModel.from_pretrained(base_model(), str(arguments.output / "adapter")).eval().to(model.device)
    with torch.no_grad():
        merged = afa.unload(afa.merge(model))
        torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(arguments.output / "merged")
    print(f"adapter/ and merged/ in {arguments.output}: stock PEFT and the merged model agree")


if __name__ == "__main__":
    main()
