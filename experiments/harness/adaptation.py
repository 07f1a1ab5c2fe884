"""What each method of ``sft.py`` trains of a pretrained model."""

from dataclasses import dataclass

import torch
from torch import nn

import afa_kernels as afa


@dataclass(frozen=True)
class Method:
    """One way to fine-tune; ``activation`` is that of AFA-LoRA."""

    title: str
    trains: str  # "head", "adapters", "adapted weights" or "everything"
    activation: str | None = None


METHODS = {
    "frozen": Method("frozen, but for a new head", "head"),
    "lora": Method("LoRA", "adapters"),
    "afa_relu": Method("AFA-LoRA relu", "adapters", "relu"),
    "afa_silu": Method("AFA-LoRA silu", "adapters", "silu"),
    "afa_gelu": Method("AFA-LoRA gelu", "adapters", "gelu"),
    "full_adapted": Method("full, adapted weights only", "adapted weights"),
    "full": Method("full fine-tuning", "everything"),
}


@dataclass(frozen=True)
class Adapter:
    """What LoRA and AFA-LoRA have in common."""

    r: int
    lora_alpha: float
    target_modules: str = "all-linear"


def adapt(model: nn.Module, method: Method, adapter: Adapter, head: str | None) -> list[str]:
    """Make ``model`` ready for ``method`` in place; return the names of the layers that adapters sit on.

    Adapters start at alpha_t = 0 for a LoRA, which is AFA-LoRA annealed from the start, and at 1 otherwise.

    Args:
        head: name of a new module, trained by every method; None if there is none.
    """
    afa.inject(
        model,
        adapter.target_modules,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        activation=method.activation or "silu",
        trainable=[head] if head else (),
    )
    adapted = [name for name, module in model.named_modules() if isinstance(module, afa.AFALinear)]
    if method.trains == "adapters":
        if method.activation is None:
            afa.set_alpha_t(model, 0.0)
        return adapted
    afa.unload(model)  # the branches are dropped: the model is the pretrained one again, frozen
    if method.trains == "everything":
        model.requires_grad_(True)
    elif method.trains == "adapted weights":
        for name in adapted:
            model.get_submodule(name).weight.requires_grad_(True)
    return adapted


def parameter_groups(model: nn.Module, head: str | None, learning_rate: float, head_learning_rate: float) -> list[dict]:
    """Return the optimizer's groups: what trains of the pretrained model, and the head."""
    own = set(model.get_submodule(head).parameters()) if head else set()
    body = [p for p in model.parameters() if p.requires_grad and p not in own]
    groups = [{"params": body, "lr": learning_rate}] if body else []
    if own:
        groups.append({"params": list(own), "lr": head_learning_rate})
    return groups


def freeze_in_bfloat16(model: nn.Module) -> None:
    """Store what does not train in bfloat16; what trains keeps its dtype."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
