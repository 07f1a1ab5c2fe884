"""Versions of an adapter for an engine that generates while it is trained."""

import itertools
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from afa_kernels.model.checkpoint import save_adapter

_VERSION = "version-"
# Engines know an adapter by a number; far from those that a user would give to others.
_ids = itertools.count(1_000_000)


class Rollout(NamedTuple):
    """One version of an adapter: what an engine is told.

    Attributes:
        name: new for each version, because vLLM keeps computed prefixes by the name of the adapter.
        id: unique in this process.
        path: the folder with PEFT's two files.
    """

    name: str
    id: int
    path: Path

    def request(self) -> Any:
        """Return the ``LoRARequest`` for vLLM's ``LLM.generate(..., lora_request=)``."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.name, self.id, str(self.path))


def save_rollout(
    model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None, *, keep: int = 2
) -> Rollout:
    """Write the next version of an adapter, where it stands, into a folder of its own under ``path``.

    The files are those that ``save_pretrained`` of a PEFT model and :func:`afa_kernels.save_adapter` write: at
    ``alpha_t > 0`` vLLM serves them through the plugin of this package, and stock vLLM and stock PEFT refuse them; at 0
    all of them load a LoRA. A version appears complete or not at all.

    Args:
        model: a PEFT model (not wrapped for distributed training), or one adapted by :func:`afa_kernels.inject`.
        adapter: its name; by default the active one of a PEFT model, and the one without a name otherwise.
        keep: how many versions stay on disk, this one included.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model has no such adapter, or a sharded one.
    """
    if not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep: expected the number of versions that stay, 1 or more, got {keep!r}")
    folder = Path(path).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    versions = sorted(_versions_in(folder))
    version = versions[-1] + 1 if versions else 1
    target = folder / f"{_VERSION}{version:06d}"
    unfinished = folder / f".{target.name}.{os.getpid()}"
    try:
        _save(model, unfinished, adapter)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in [*versions, version][:-keep]:
        shutil.rmtree(folder / f"{_VERSION}{old:06d}", ignore_errors=True)
    return Rollout(f"{folder.name}-{version}", next(_ids), target)


def _versions_in(folder: Path) -> list[int]:
    numbers = (entry.name.removeprefix(_VERSION) for entry in folder.glob(f"{_VERSION}*"))
    return [int(number) for number in numbers if number.isdecimal()]


def _save(model: nn.Module, folder: Path, adapter: str | None) -> None:
    with warnings.catch_warnings():
        # That others refuse it is what it is for.
        warnings.filterwarnings("ignore", ".*(so stock PEFT refuses this|where stock PEFT and stock vLLM refuse it)")
        if hasattr(model, "peft_config"):
            _save_peft(model, folder, adapter)
        else:
            save_adapter(model, folder, adapter)


def _save_peft(model: nn.Module, folder: Path, adapter: str | None) -> None:
    name = adapter or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"adapter: the model has no adapter {name!r}; it has {', '.join(model.peft_config)}")
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError("model: its parameters are sharded (DTensor), and PEFT saves whole ones; gather them first")
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    inner = folder / name  # where PEFT puts adapters that are not called "default"
    if inner.is_dir():
        for file in inner.iterdir():
            file.replace(folder / file.name)
        inner.rmdir()
