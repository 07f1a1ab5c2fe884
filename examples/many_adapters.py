"""Four adapters trained at once on one frozen model, and the same four one after the other.

    python examples/many_adapters.py [--steps 60] [--samples 4] [--width 128] [--output outputs/many_adapters]

A small Llama with random weights learns four texts, byte by byte, with an adapter for each. Needs transformers and
safetensors.
"""

import argparse
import contextlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import afa_kernels as afa

LENGTH = 64  # bytes in one sample
TEXTS = {
    "rhyme": "Twinkle, twinkle, little star, how I wonder what you are. ",
    "numbers": "".join(f"{i} times {j} is {i * j}. " for i in range(2, 7) for j in range(2, 7)),
    "code": "for i in range(10):\n    total += i * i\nprint(total)\n",
    "letters": "the quick brown fox jumps over the lazy dog; ",
}
# Of each adapter, what differs from the options of inject, and where its annealing ends.
ADAPTERS = {"rhyme": {"r": 4}, "numbers": {"r": 16, "lora_alpha": 32}, "code": {"r": 8}, "letters": {"r": 8}}
END = {"rhyme": 0.5, "numbers": 0.8, "code": 0.8, "letters": 0.3}


def base_model(width: int = 128) -> LlamaForCausalLM:
    """Yours: ``AutoModelForCausalLM.from_pretrained(...)``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def samples_of(name: str) -> Tensor:
    text = torch.tensor(list(TEXTS[name].encode())).repeat(60)
    return text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)


def train(
    model: nn.Module, names: list[str], steps: int, samples: int, *, at_once: bool
) -> tuple[dict[str, float], float]:
    """Train the adapters called so, or the only one that the model has, with so many samples of each in a step; return
    their losses and the samples per second."""
    data = {name: samples_of(name) for name in names}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    schedules = [afa.AnnealSchedule(steps, end_frac=END[name]) for name in names]
    for name, schedule in zip(names, schedules, strict=True):
        schedule.attach(model, name if at_once else None)
    of_samples = [name for name in names for _ in range(samples)]  # sorted by adapter: no layer has to copy them
    start = time.perf_counter()
    for step in range(steps):
        if step == 1:  # the first one is slower: caches are filled
            start = time.perf_counter()
        ids = torch.cat([data[name][torch.randint(len(data[name]), (samples,))] for name in names])
        with afa.adapters_of(model, of_samples) if at_once else contextlib.nullcontext():
            logits = model(input_ids=ids).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses = each.view(len(names), -1).mean(1)  # of each adapter what its own batch would give
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    seconds = time.perf_counter() - start
    rate = len(of_samples) * (steps - 1) / seconds if steps > 1 else float("nan")
    return dict(zip(names, losses.tolist(), strict=True)), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each adapter (60)")
    parser.add_argument("--samples", type=int, default=4, help="samples of each adapter in one step (4)")
    parser.add_argument("--width", type=int, default=128, help="hidden size of the model (128)")
    parser.add_argument("--output", type=Path, default=Path("outputs/many_adapters"), help="folder of the adapters")
    arguments = parser.parse_args()

    how = (arguments.steps, arguments.samples)
    model = afa.inject(base_model(arguments.width), adapters=ADAPTERS, r=8, activation="silu")
    at_once, rate = train(model, list(ADAPTERS), *how, at_once=True)
    alone, rates = {}, []
    for name, options in ADAPTERS.items():
        single = afa.inject(base_model(arguments.width), **{"r": 8, "activation": "silu", **options})
        loss, rate_alone = train(single, [name], *how, at_once=False)
        alone |= loss
        rates.append(rate_alone)

    print("adapter   loss, at once   alone")
    for name in ADAPTERS:
        print(f"{name:9} {at_once[name]:13.3f} {alone[name]:7.3f}")
    one_by_one = len(rates) / sum(1 / each for each in rates)
    print(
        f"samples per second: {rate:.1f} at once, {one_by_one:.1f} one after the other: {rate / one_by_one:.2f} times"
    )

    for name in ADAPTERS:  # each is an ordinary LoRA now, in a folder of its own that stock PEFT loads
        afa.save_adapter(model, arguments.output / name, name)
    print(f"adapters in {arguments.output}")


if __name__ == "__main__":
    main()
