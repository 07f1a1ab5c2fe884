"""AFA-LoRA with PEFT and a training loop of one's own: train, save, load in stock PEFT, merge.

    python examples/peft_lora.py [--steps 60] [--output outputs/peft_lora]

A small Llama with random weights learns the bytes of a text, so that this runs without a network. Needs
``pip install 'afa-kernels[peft]' transformers``.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from afa_kernels.peft import AFALoraConfig

TEXT = "AFA-LoRA puts an activation between A and B, and anneals it to the identity during training. " * 40
LENGTH = 64  # bytes in one sample


def base_model() -> LlamaForCausalLM:
    """Yours: ``AutoModelForCausalLM.from_pretrained(...)``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (60)")
    parser.add_argument("--output", type=Path, default=Path("outputs/peft_lora"), help="folder of the adapter")
    arguments = parser.parse_args()

    # The one line that differs from a LoRA is this configuration; the other fields are LoraConfig's.
    config = AFALoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16, activation="silu")
    model = get_peft_model(base_model(), config)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    schedule = config.schedule(arguments.steps).attach(model)  # alpha_t: 1 -> 0 over the first 80% of the steps
    data = torch.tensor(list(TEXT.encode()))
    samples = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    for step in range(arguments.steps):
        ids = samples[torch.randint(len(samples), (4,))]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step:3d}  alpha_t {schedule.alpha_t:.2f}  loss {loss.item():.3f}")
        schedule.step()

    # alpha_t is 0 now: the adapter is an ordinary LoRA. Stock PEFT loads it, and it merges into the weights.
    model.eval()
    model.save_pretrained(arguments.output)
    loaded = PeftModel.from_pretrained(base_model(), arguments.output).eval()
    merged = model.merge_and_unload()
    with torch.no_grad():
        logits = merged(input_ids=samples[:1]).logits
        torch.testing.assert_close(loaded(input_ids=samples[:1]).logits, logits, rtol=1e-3, atol=1e-3)
    print(f"adapter in {arguments.output}: stock PEFT and the merged model agree")


if __name__ == "__main__":
    main()
