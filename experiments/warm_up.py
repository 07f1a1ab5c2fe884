"""Train a byte-level model of ``pretrain.py`` further, in full, as the start of another example.

    python -m experiments.warm_up english        the target of speculative.py: the help texts in pydoc_data
    python -m experiments.warm_up operations     the policy of rl.py: results of operations, signs without meaning

About a minute each on one core. A folder that was made with the same settings is kept (``--force`` makes it again).
"""

import argparse
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo.report import environment, write_json
from experiments.harness import bytelm, operations, report

RECORD = "warm_up.json"
WARMUP_FRAC = 0.05


@dataclass(frozen=True)
class Settings:
    task: str
    model: str
    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    length: int = 128  # tokens of English
    seed: int = 0

    def learning_rate_factor(self, step: int) -> float:
        """Return the factor of step 0, 1, ...: up in a line, then down to 0 in a line."""
        return min(1.0, (step + 1) / max(1.0, WARMUP_FRAC * self.steps), 1 - step / self.steps)


DEFAULTS = {
    "english": Settings("english", str(bytelm.DEFAULT_FOLDER), steps=300, batch_size=16),
    "operations": Settings("operations", "outputs/draft", steps=500, batch_size=64, learning_rate=2e-3),
}
FOLDERS = {"english": Path("outputs/target"), "operations": Path("outputs/policy")}


def train(settings: Settings, folder: Path, quiet: bool = False) -> dict:
    """Train all weights, save model and tokenizer to ``folder``, and return what was measured."""
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate_factor)
    text = bytelm.topics().train if settings.task == "english" else None
    generator = random.Random(settings.seed)
    began, losses = time.process_time(), []
    model.train()
    bar = tqdm(range(settings.steps), desc=f"warm up: {settings.task}", unit="step", disable=quiet, mininterval=1.0)
    for step in bar:
        if text is None:
            problems = operations.without_meaning(settings.batch_size, generator)
            tokens, mask, labels = operations.encoded(problems, tokenizer)
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        else:
            loss = bytelm.loss(model, bytelm.batch(text, settings.batch_size, settings.length, settings.seed, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = {
        "settings": asdict(settings),
        "last_training_loss": sum(losses[-20:]) / len(losses[-20:]),
        "cpu_seconds": time.process_time() - began,
        "environment": environment(),
    }
    write_json(folder / RECORD, result)
    return result


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(DEFAULTS))
    for name, value in asdict(DEFAULTS["english"]).items():
        if name != "task":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    parser.add_argument("--output", type=Path, help="folder (outputs/target or outputs/policy)")
    parser.add_argument("--force", action="store_true", help="train again though the folder is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    defaults = asdict(DEFAULTS[chosen.task])
    given = {name: getattr(chosen, name) for name in defaults if getattr(chosen, name) is not None}
    settings = Settings(**defaults | given)
    if not (Path(settings.model) / "config.json").is_file():
        raise SystemExit(f"no model in {settings.model}: experiments/README.md says how pretrain.py makes it")
    folder = chosen.output or FOLDERS[chosen.task]
    record = None if chosen.force else report.finished(folder / RECORD, asdict(settings))
    if record is None:
        record = train(settings, folder)
    print(
        f"{folder}: training loss {record['last_training_loss']:.3f} nats per token at the end, "
        f"{record['cpu_seconds']:.0f} s of processor time"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
