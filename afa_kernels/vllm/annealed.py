"""The annealed activation between vLLM's two products, for rows of several adapters."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from afa_kernels.model import peft_format as fmt
from afa_kernels.operator.activation import ACTIVATIONS, phi


class Branch(NamedTuple):
    """What a LoRA checkpoint has no word for."""

    activation: str
    alpha_t: float


def branch_in(folder: str) -> tuple[Branch, str] | None:
    """Return the branch of the adapter in ``folder``, and the ``bias`` that its configuration had before it was made
    one that stock readers refuse; None for a plain LoRA.

    Raises:
        ValueError: this version does not read its files, they disagree, or its layers differ in alpha_t.
    """
    file = Path(folder) / fmt.CONFIG_FILE
    config, state = fmt.as_finished(file, json.loads(file.read_text(encoding="utf-8")))
    if not state:
        return None
    state = fmt.one_for_all_layers(file, state)
    layer = fmt.checked_layers(file, state | {"layers": None}, ["the adapter"])["the adapter"]
    weights = file.with_name(fmt.WEIGHTS_FILE)
    fmt.check_agreement(file, layer["alpha_t"], weights, fmt.alpha_t_in_weights(weights))
    return Branch(**layer), config["bias"]


class Slots:
    """The branch of each adapter slot of an engine, in tensors that stay where they are: compiled models and CUDA
    graphs read them, which know nothing of Python's decisions.

    Args:
        count: the number of slots.
        device: of the engine's worker.
    """

    def __init__(self, count: int, device: torch.device | str):
        # The first row is that of tokens without an adapter, whose index is -1.
        self._alpha_t = torch.zeros(count + 1, dtype=torch.float32, device=device)
        self._activation = torch.zeros(count + 1, dtype=torch.int32, device=device)
        self._names: list[str | None] = [None] * count  # of the activations

    def write(self, slot: int, branch: Branch | None) -> None:
        """Put an adapter into a slot; None: a plain LoRA."""
        self._alpha_t[slot + 1] = branch.alpha_t if branch else 0.0
        self._activation[slot + 1] = ACTIVATIONS[branch.activation].id if branch else 0
        self._names[slot] = branch.activation if branch else None

    def apply(self, z: Tensor, slots: Tensor) -> Tensor:
        """Return phi(z), with the bits of z where the slot has a plain LoRA and 0 where there is no adapter.

        Args:
            z: ``(..., tokens, r)``, float32: the product with A, without scaling.
            slots: ``(tokens,)``, the slot of each token; -1: none. What lies outside (of padding rows, which nobody
                reads) is treated as some slot.
        """
        row = (slots + 1).clamp(0, len(self._alpha_t) - 1)
        alpha_t = self._alpha_t[row].unsqueeze(-1)
        activation = self._activation[row].unsqueeze(-1)
        out = torch.where((row == 0).unsqueeze(-1), 0.0, z)
        # What is compiled or captured once computes all, for adapters that come later.
        runs_once = torch.compiler.is_compiling() or z.device.type != "cpu"
        for name in ACTIVATIONS if runs_once else {name for name in self._names if name}:
            out = torch.where(activation == ACTIVATIONS[name].id, phi(z, alpha_t, name), out)
        return out
