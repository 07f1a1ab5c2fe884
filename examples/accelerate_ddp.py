"""AFA-LoRA on several processes with Accelerate: anneal by optimizer step, save once, merge.

    accelerate launch --num_processes 2 examples/accelerate_ddp.py
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/accelerate_ddp.py   # on the CPU
    accelerate launch --use_deepspeed --deepspeed_config_file examples/deepspeed_zero2.json examples/accelerate_ddp.py

A small Llama, made from its configuration, learns the bytes of a text. Needs transformers and accelerate.
"""

import argparse
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import afa_kernels as afa

BYTES = 256
TEXT = Path(__file__).resolve().parents[1] / "LICENSE"


def small_llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=BYTES, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--length", type=int, default=64, help="bytes in one sample")
    parser.add_argument("--output", type=Path, default=Path("outputs/accelerate_ddp"))
    arguments = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)  # the same model on every process
    model = small_llama()
    # The head is drawn at random here, so it trains too; of a pretrained model it would stay frozen.
    afa.inject(model, r=8, trainable=["lm_head"], share_inputs=True)
    samples = torch.frombuffer(bytearray(arguments.text.read_bytes()), dtype=torch.uint8).long()
    samples = samples[: len(samples) // arguments.length * arguments.length].view(-1, arguments.length)
    loader = DataLoader(samples, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # alpha_t depends on the number of steps alone: every process has the same, without a message.
    schedule = afa.AnnealSchedule(arguments.steps).attach(accelerator.unwrap_model(model))
    accelerator.register_for_checkpointing(schedule)

    model.train()
    while schedule.current_step < arguments.steps:
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            schedule.step()
            if schedule.current_step == 1 or schedule.current_step % 20 == 0:
                mean = accelerator.reduce(loss.detach(), reduction="mean").item()
                accelerator.print(f"step {schedule.current_step} alpha_t {schedule.alpha_t:.3f} loss {mean:.3f}")
            if schedule.current_step == arguments.steps:
                break

    accelerator.wait_for_everyone()
    plain = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        afa.save_adapter(plain, arguments.output)
        afa.merge(plain)
        print(f"{accelerator.num_processes} processes, adapter in {arguments.output}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
