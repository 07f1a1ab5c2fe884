"""The ways to fine-tune that are compared: what each trains, and how fast."""

from dataclasses import dataclass
from pathlib import Path

import torch

import afa_kernels as afa

from .classifier import Classifier
from .training import Recipe


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    ``learning_rate`` is the peak for what trains below the head. It is the one of ``grid`` with the
    best validation accuracy; ``--tune`` runs that choice again.
    """

    title: str
    learning_rate: float = 0.0
    grid: tuple[float, ...] = ()


# The head is new in every method and always learns at this rate, chosen with the encoder frozen.
HEAD = "head"
HEAD_METHOD = Method("frozen encoder, head only", 1e-2, (3e-3, 1e-2, 3e-2))
METHODS = {
    HEAD: HEAD_METHOD,
    "lora": Method("LoRA", 1e-3, (3e-4, 1e-3, 3e-3)),
    "afa": Method("AFA-LoRA", 1e-3, (3e-4, 1e-3, 3e-3)),
    "full": Method("full fine-tuning", 1e-4, (3e-5, 1e-4, 3e-4)),
}


@dataclass(frozen=True)
class Adapter:
    """The same for LoRA and AFA-LoRA, but for the activation."""

    r: int = 4
    lora_alpha: float = 8.0
    activation: str = "silu"


@dataclass
class Prepared:
    """A model ready to train: its optimizer groups and, for AFA-LoRA, its attached schedule."""

    model: Classifier
    groups: list[dict]
    schedule: afa.AnnealSchedule | None = None


def prepare(
    name: str,
    path: str | Path,
    labels: int,
    recipe: Recipe,
    adapter: Adapter,
    learning_rate: float | None = None,
) -> Prepared:
    """Return the pretrained model made ready for the method ``name``; heads and adapters start the
    same in every method."""
    torch.manual_seed(recipe.seed)
    model = Classifier(path, labels)
    if name == HEAD:
        model.encoder.requires_grad_(False)
        rate = learning_rate or HEAD_METHOD.learning_rate
        return Prepared(model, [{"params": model.head.parameters(), "lr": rate}])
    schedule = None
    if name in ("lora", "afa"):
        options = {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "trainable": "head"}
        afa.inject(model, "all-linear", activation=adapter.activation, **options)
        if name == "lora":
            afa.set_alpha_t(model, 0.0)  # a LoRA is AFA-LoRA annealed from the start
        else:
            schedule = annealing(recipe).attach(model)
    body = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [
        {"params": body, "lr": learning_rate or METHODS[name].learning_rate},
        {"params": model.head.parameters(), "lr": HEAD_METHOD.learning_rate},
    ]
    return Prepared(model, groups, schedule)


def annealing(recipe: Recipe) -> afa.AnnealSchedule:
    """Return the schedule that reaches 0 when the learning rate starts to decay."""
    return afa.AnnealSchedule(recipe.steps, "linear", end_frac=recipe.decay_from_frac)
