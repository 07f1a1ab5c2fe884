"""The training loop that every method shares, and evaluation."""

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from .classifier import Batch, Classifier, Encoded


@dataclass(frozen=True)
class Recipe:
    """What all methods have in common: steps, batches, shape of the learning rate."""

    steps: int
    batch_size: int
    evaluate_every: int
    curve_examples: int  # of the validation split, for the curve
    seed: int = 0
    warmup_frac: float = 0.1
    decay_from_frac: float = 0.6  # the learning rate is constant until then, so that the ordinary
    # LoRA that annealing ends in still learns at full rate

    def learning_rate_factor(self, step: int) -> float:
        """Return the factor of step 0, 1, ...: up, constant, down to 0."""
        up = (step + 1) / max(1.0, self.warmup_frac * self.steps)
        down = (self.steps - step) / max(1.0, (1 - self.decay_from_frac) * self.steps)
        return min(1.0, up, down)


@dataclass
class Curve:
    """What was measured along the way; ``alpha_t`` is that of the forward of each step."""

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    alpha_t: list[float] = field(default_factory=list)
    seconds: float = 0.0  # without evaluation

    def as_dict(self) -> dict:
        return asdict(self)


def train(
    model: Classifier,
    groups: list[dict],
    train_set: Encoded,
    validation_set: Encoded,
    recipe: Recipe,
    *,
    schedule=None,
    name: str = "",
    quiet: bool = False,
) -> Curve:
    """Train the parameter groups of ``model`` by AdamW on cross-entropy, with a progress bar.

    Args:
        groups: parameter groups of the optimizer with their peak learning rates.
        schedule: an attached AnnealSchedule; stepped after each optimizer step.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    learning_rate = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.learning_rate_factor)
    curve = Curve()
    batches = train_set.training_batches(recipe.steps, recipe.batch_size, recipe.seed)
    seconds = 0.5 if sys.stderr.isatty() else 10.0  # between two states of the bar: a log keeps all of them
    bar = tqdm(total=recipe.steps, desc=f"{name:<9}", unit="step", disable=quiet, mininterval=seconds)
    model.train()
    for step, batch in enumerate(batches):
        if step % recipe.evaluate_every == 0:
            _note_accuracy(curve, step, model, validation_set, recipe)
        began = time.perf_counter()
        alpha_t = 0.0 if schedule is None else schedule.alpha_t
        loss = nn.functional.cross_entropy(logits(model, batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
        if schedule is not None:
            schedule.step()
        curve.seconds += time.perf_counter() - began
        curve.loss.append(loss.item())
        curve.alpha_t.append(alpha_t)
        shown = {"loss": f"{loss.item():.3f}"}
        if schedule is not None:
            shown["alpha_t"] = f"{alpha_t:.2f}"
        shown["ex_per_s"] = f"{(step + 1) * recipe.batch_size / curve.seconds:.0f}"
        bar.set_postfix(shown, refresh=False)
        bar.update()
    _note_accuracy(curve, recipe.steps, model, validation_set, recipe)
    bar.close()
    return curve


def _note_accuracy(curve: Curve, step: int, model, validation_set: Encoded, recipe: Recipe) -> None:
    batches = validation_set.evaluation_batches(limit=recipe.curve_examples)
    curve.steps.append(step)
    curve.accuracy.append(accuracy(model, batches))


def logits(model: Classifier, batch: Batch) -> torch.Tensor:
    return model(batch.input_ids, batch.attention_mask)


def accuracy(model: Classifier, batches: Iterable[Batch]) -> float:
    """Return the fraction of examples whose largest logit is that of their label."""
    return correct(model, batches).double().mean().item()


@torch.no_grad()
def correct(model: Classifier, batches: Iterable[Batch]) -> torch.Tensor:
    """Return for each example, in the order of ``batches``, whether its label is predicted."""
    training = model.training
    model.eval()
    right = torch.cat([logits(model, batch).argmax(1) == batch.labels for batch in batches])
    model.train(training)
    return right


def trainable_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
