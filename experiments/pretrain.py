"""Pretrain a small byte-level Llama on the source of this Python's standard library.

    python -m experiments.pretrain                        1.26M parameters, about four minutes on one core
    python -m experiments.pretrain --hidden 64 --layers 2 --steps 400 --output outputs/draft

The folder loads with ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``. A folder that
exists already is kept if it was made with the same settings (``--force`` makes it again).
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from examples.demo.report import environment, write_json
from experiments.harness import bytelm, report

RECORD = "pretrain.json"
WARMUP_FRAC = 0.05
HELD_OUT_WINDOWS = 256


@dataclass(frozen=True)
class Settings:
    """What the weights depend on, beside the Python version that brings the text."""

    hidden: int = 160
    layers: int = 4
    steps: int = 1200
    batch_size: int = 16
    length: int = 128  # bytes
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0

    def learning_rate_factor(self, step: int) -> float:
        """Return the factor of step 0, 1, ...: up in a line, then down to 0.05 along a cosine."""
        warmup = max(1.0, WARMUP_FRAC * self.steps)
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, self.steps - warmup)))


def pretrain(settings: Settings, folder: Path, quiet: bool = False) -> dict:
    """Train, save model and tokenizer to ``folder``, and return what was measured."""
    train, held_out = bytelm.standard_library_source()
    model = bytelm.new_model(settings.hidden, settings.layers, settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate_factor)
    began, cpu_began = time.perf_counter(), time.process_time()
    losses = []
    model.train()
    bar = tqdm(range(settings.steps), desc="pretrain", unit="step", disable=quiet, mininterval=1.0)
    for step in bar:
        tokens = bytelm.batch(train, settings.batch_size, settings.length, settings.seed, step)
        loss = bytelm.loss(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    measured = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_of_source": len(train),
        "last_training_loss": sum(losses[-20:]) / len(losses[-20:]),
        "held_out_nats_per_byte": bytelm.nats_per_byte(model, held_out, settings.length, HELD_OUT_WINDOWS),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
    }
    model.save_pretrained(folder)
    bytelm.tokenizer().save_pretrained(folder)
    result = {"settings": asdict(settings), **measured, "environment": environment()}
    write_json(folder / RECORD, result)
    return result


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    parser.add_argument("--output", type=Path, default=bytelm.DEFAULT_FOLDER, help=f"({bytelm.DEFAULT_FOLDER})")
    parser.add_argument("--force", action="store_true", help="train again though the folder is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    settings = Settings(**{name: getattr(chosen, name) for name in asdict(Settings())})
    record = None if chosen.force else report.finished(chosen.output / RECORD, asdict(settings))
    if record is None:
        record = pretrain(settings, chosen.output)
    print(
        f"{chosen.output}: {record['parameters']:,} parameters, {record['held_out_nats_per_byte']:.3f} nats per byte "
        f"on held-out files, {record['cpu_seconds']:.0f} s of processor time"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
