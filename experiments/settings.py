"""The methods that are compared, and the settings that the studies have in common."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Before transformers is imported: --model and --data may name things on the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "0")

from torch import nn
from trl import TrlParser

import afa_kernels as afa


@dataclass(frozen=True)
class Method:
    """One way to fine-tune; ``activation`` is that of AFA-LoRA."""

    title: str
    trains: str  # "head", "adapters", "adapted weights" or "everything"
    activation: str | None = None

    def adapt(self, model: nn.Module, settings: "Settings", head: str | None = None) -> None:
        """Make ``model`` ready in place; ``head`` is a new module that every method trains. A LoRA is an AFA-LoRA
        that is annealed from the start."""
        options = {"r": settings.r, "lora_alpha": settings.lora_alpha, "trainable": [head] if head else ()}
        afa.inject(model, settings.target_modules, activation=self.activation or "silu", **options)
        adapted = [name for name, module in model.named_modules() if isinstance(module, afa.AFALinear)]
        if self.trains == "adapters":
            if self.activation is None:
                afa.set_alpha_t(model, 0.0)
            return
        afa.unload(model)  # the branches are dropped: the model is the pretrained one again, frozen
        if self.trains == "everything":
            model.requires_grad_(True)
        elif self.trains == "adapted weights":
            for name in adapted:
                model.get_submodule(name).weight.requires_grad_(True)

    def annealing(self, settings: "Settings") -> afa.AnnealSchedule | None:
        if self.activation is None:
            return None
        return afa.AnnealSchedule(settings.steps, settings.schedule, end_frac=settings.anneal_end_frac)


METHODS = {
    "frozen": Method("frozen, but for a new head", "head"),
    "lora": Method("LoRA", "adapters"),
    "afa_relu": Method("AFA-LoRA relu", "adapters", "relu"),
    "afa_silu": Method("AFA-LoRA silu", "adapters", "silu"),
    "afa_gelu": Method("AFA-LoRA gelu", "adapters", "gelu"),
    "full_adapted": Method("full, adapted weights only", "adapted weights"),
    "full": Method("full fine-tuning", "everything"),
}


def setting(default: Any, help: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """What the studies have in common. Mappings are JSON on the command line."""

    model: str | None = setting(None, "Hugging Face id or folder; default: the small model of the study")
    data: str | None = setting(None, "Hugging Face id, .txt, .csv or .jsonl file; default: text of this Python")
    text_column: str = setting("text", "of --data")
    label_column: str = setting("label", "of --data, where it has labels or answers")
    methods: list[str] = setting(list(METHODS), f"some of {', '.join(METHODS)}")
    seeds: int = setting(5, "runs of each method, seeds 0, 1, ...")
    steps: int = setting(150, "optimizer steps")
    batch_size: int = setting(8, "samples in a step, over all processes")
    length: int = setting(128, "tokens of a sample at most")
    evaluate_every: int = setting(15, "steps between the points of the curve")
    curve_examples: int = setting(64, "validation samples of a point of the curve")
    test_examples: int | None = setting(None, "test samples of the final score; default: all")
    r: int = setting(2, "rank of the adapters")
    lora_alpha: float = setting(4.0, "their scale is lora_alpha / r")
    target_modules: str = setting("all-linear", "what the adapters adapt, as in afa_kernels.inject")
    schedule: str = setting("linear", "kind of afa_kernels.AnnealSchedule")
    anneal_end_frac: float = setting(0.6, "of the steps, where alpha_t reaches 0")
    warmup_frac: float = setting(0.1, "of the steps, where the learning rate rises")
    decay_from_frac: float = setting(0.6, "of the steps, from where the learning rate falls")
    learning_rates: dict | str | None = setting({}, "peak of each method")
    grids: dict | str | None = setting({}, "learning rates of each method that --tune tries")
    tuning_seed: int = setting(1000, "of --tune, no seed of the comparison")
    tuning_seeds: int = setting(1, "of --tune, from --tuning-seed on; rates are chosen by the mean score")
    bf16: bool = setting(False, "bfloat16 autocast in training")
    checkpoint_every: int = setting(50, "steps between checkpoints of an unfinished cell")
    output: str = setting("outputs", "folder of all results")

    def __post_init__(self):
        for name in ("learning_rates", "grids"):  # JSON from a flag; YAML reads 1e-3 as text
            given = getattr(self, name) or {}
            given = json.loads(given) if isinstance(given, str) else given
            rates = {m: [float(r) for r in v] if name == "grids" else float(v) for m, v in given.items()}
            setattr(self, name, rates)
            self.expect(name, set(rates) <= set(METHODS), f"rates of some of {', '.join(METHODS)}")
        self.expect("methods", set(self.methods) <= set(METHODS), f"some of {', '.join(METHODS)}")
        for name in ("seeds", "steps", "batch_size", "evaluate_every", "curve_examples", "r", "checkpoint_every"):
            value = getattr(self, name)
            self.expect(name, isinstance(value, int) and value >= 1, "a whole number, at least 1")
        self.expect("tuning_seed", self.tuning_seed >= self.seeds, f"a seed that the {self.seeds} runs do not use")
        METHODS["afa_silu"].annealing(self)  # says what does not fit

    def expect(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"{name}: expected {wanted}, got {getattr(self, name)!r}")


def parse(kind: type[Settings], argv: Sequence[str] | None, description: str) -> tuple[Any, bool, bool]:
    """Return the settings of flags and of the YAML file ``--config``, which flags override, ``--tune`` and ``--quiet``.

    Raises:
        ValueError, OSError: the file is missing, has an unknown entry, or a value does not fit.
    """
    parser = TrlParser(kind, description=f"{description.splitlines()[0]} --config FILE.yaml gives other defaults.")
    parser.add_argument("--tune", action="store_true", help="run the grids on the validation split")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    settings, chosen = parser.parse_args_and_config(argv)
    return settings, chosen.tune, chosen.quiet
