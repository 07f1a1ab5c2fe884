"""Make the byte-level Llamas that the studies start from, in full training.

    python -m experiments.pretrain source target     for sft.py and speculative.py
    python -m experiments.pretrain draft policy      for speculative.py and rl.py

``source`` (1.26M parameters) and ``draft`` (0.26M) learn the source of this Python's standard library. ``target`` is
``source`` trained further on English, the help texts in pydoc_data; ``policy`` is ``draft`` trained further on results
of operations whose signs mean nothing yet. Each goes to ``outputs/NAME``, loads with
``AutoModelForCausalLM.from_pretrained``, and is kept if it is there already.
"""

import argparse
import math
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from examples.demo.report import environment, write_json
from experiments import data, rl
from experiments.training import InOrder

OUTPUTS = Path("outputs")
HEAD_SIZE = 32


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on, beside the Python version that brings the text."""

    text: str  # "source", "english" or "operations"
    steps: int
    batch_size: int
    learning_rate: float
    start: str | None = None  # the model that is trained further; None: a new one
    hidden: int = 160  # of a new model
    layers: int = 4
    length: int = 128  # tokens
    seed: int = 0

    def learning_rate_factor(self, step: int) -> float:
        """Return the factor of step 0, 1, ...: up in a line, then down to 0.05 along a cosine, or to 0 in a line where
        a model is trained further."""
        warmup = 0.05 * self.steps
        if self.start:
            return min(1.0, (step + 1) / warmup, 1 - step / self.steps)
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))


MODELS = {
    "source": Recipe("source", 1200, 16, 3e-3),
    "draft": Recipe("source", 800, 16, 3e-3, hidden=96, layers=2),
    "target": Recipe("english", 300, 16, 1e-3, start="source"),
    "policy": Recipe("operations", 500, 64, 2e-3, start="draft"),
}


def new_model(hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Return a Llama over bytes with random weights; ``hidden`` is a multiple of 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=data.VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=data.END,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def batches(recipe: Recipe) -> Callable:
    """Return the function that makes the batch of some places."""
    if recipe.text == "operations":
        problems = rl.without_meaning(recipe.steps * recipe.batch_size, random.Random(recipe.seed))
        tokenizer = data.tokenizer()
        return lambda places: rl.encoded([problems[place] for place in places], tokenizer)
    ids = data.standard_library_source()[0] if recipe.text == "source" else data.encode(data.topic_texts()["train"])
    size = recipe.batch_size
    return lambda places: {"input_ids": data.batch(ids, size, recipe.length, recipe.seed, places[0] // size)}


def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss if "labels" in batch else data.loss(model, batch["input_ids"])


def pretrain(recipe: Recipe, folder: Path, quiet: bool = False) -> None:
    """Train, and save model, tokenizer and what was measured to ``folder``."""
    if recipe.start:
        model = AutoModelForCausalLM.from_pretrained(folder.parent / recipe.start, dtype=torch.float32)
    else:
        model = new_model(recipe.hidden, recipe.layers, recipe.seed)
    betas, decay = ((0.9, 0.999), 0.01) if recipe.start else ((0.9, 0.95), 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=betas, weight_decay=decay)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        seed=recipe.seed,
        max_grad_norm=1.0,
        use_cpu=PartialState().device.type == "cpu",
        save_strategy="no",
        logging_steps=min(20, recipe.steps),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=quiet,
    )
    began = time.process_time()
    trainer = InOrder(model, arguments, batches(recipe), loss, optimizer, recipe.learning_rate_factor)
    trainer.train()
    record = {"recipe": asdict(recipe), "cpu_seconds": time.process_time() - began, "environment": environment()}
    record["parameters"] = model.num_parameters()
    record["last_training_loss"] = next(e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e)
    if recipe.text == "source":
        record["held_out_nats_per_byte"] = data.nats_per_token(
            model, data.standard_library_source()[1], recipe.length, 256
        )
    model.save_pretrained(folder)
    data.tokenizer().save_pretrained(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    write_json(folder / "pretrain.json", record)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    chosen = parser.parse_args(argv)
    PartialState(cpu=not torch.cuda.is_available())
    for name in chosen.models:
        folder, recipe = OUTPUTS / name, MODELS[name]
        if recipe.start and not (OUTPUTS / recipe.start / "config.json").is_file():
            parser.error(f"{name}: it begins with {recipe.start}: python -m experiments.pretrain {recipe.start} {name}")
        if (folder / "config.json").is_file():
            print(f"{folder} is there already")
        else:
            pretrain(recipe, folder, chosen.quiet)
            print((folder / "pretrain.json").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
