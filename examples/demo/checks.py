"""What must hold once alpha_t is 0: the adapter merges into plain layers, stock PEFT loads it."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import afa_kernels as afa

from .classifier import Batch, Classifier
from .training import logits


@torch.no_grad()
def logits_of(model, batches: list[Batch]) -> Tensor:
    """Return the logits of all batches, ``(examples, labels)``."""
    model.eval()
    return torch.cat([logits(model, batch) for batch in batches])


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def peft_round_trip(model: Classifier, batches: list[Batch], folder: Path, pretrained: Classifier) -> dict:
    """Save the adapter of ``model``, load it into ``pretrained`` with stock PEFT, compare logits.

    ``pretrained`` is changed: PEFT wraps its layers.
    """
    import peft

    afa.save_adapter(model, folder)
    loaded = peft.PeftModel.from_pretrained(pretrained, folder)
    difference = largest_difference(logits_of(loaded, batches), logits_of(model, batches))
    return {
        "peft_version": peft.__version__,
        "files": sorted(file.name for file in folder.iterdir()),
        "largest_logit_difference": difference,
    }


def merge_check(model: Classifier, batches: list[Batch], pretrained: Classifier) -> dict:
    """Merge ``model`` and compare its logits, and the operators that it runs with those of the
    plain ``pretrained`` model."""
    before = logits_of(model, batches)
    unmerged_operators = operators(model, batches[0])
    afa.merge(model)
    after = logits_of(model, batches)
    merged_operators = operators(model, batches[0])
    layer = next(m for m in model.modules() if isinstance(m, afa.AFALinear))
    path = layer.plan(torch.zeros(1, layer.in_features)).path
    afa.unload(model)
    return {
        "largest_logit_difference": largest_difference(before, after),
        "path": path,
        "largest_logit": before.abs().max().item(),
        "afa_operators_unmerged": sum(map(_is_ours, unmerged_operators)),
        "afa_operators_merged": sum(map(_is_ours, merged_operators)),
        "operators_merged": len(merged_operators),
        "runs_the_plain_layers": merged_operators == operators(pretrained, batches[0]),
        "layers_left": sum(isinstance(m, afa.AFALinear) for m in model.modules()),
        "unloaded_equals_merged": torch.equal(after, logits_of(model, batches)),
    }


@torch.no_grad()
def operators(model, batch: Batch) -> list[str]:
    """Return the names of the operators of one forward, in order."""
    model.eval()
    with _Recorder() as recorder:
        logits(model, batch)
    return recorder.names


def _is_ours(operator: str) -> bool:
    return operator.startswith("afa_kernels")


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
