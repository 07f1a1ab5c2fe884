"""The seam of transformers 5 for implementations of an experts module, and what a module needs to go through it.

The forward of an experts class asks ``config._experts_implementation`` for a function. A module with branches gets a
configuration of its own that names ours, so that no other module is concerned; the rest of its configuration stays the
model's.
"""

from typing import Any

from torch import nn

from afa_kernels.experts.forward import experts_forward
from afa_kernels.experts.parameters import Branches

IMPLEMENTATION = "afa_lora"


class _OwnImplementation:
    """The configuration of the model, but for the implementation of one experts module."""

    _experts_implementation = IMPLEMENTATION

    def __init__(self, config: Any):
        self.of_model = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # whoever unpickles the model may be another process

    def __getattr__(self, name: str) -> Any:
        if name == "of_model" or name.startswith("__"):  # a copy that is being made has no attributes yet
            raise AttributeError(name)
        return getattr(self.of_model, name)


def attach(experts: nn.Module, branches: Branches) -> None:
    """Let ``experts`` compute with ``branches``, which it keeps as ``experts.afa``."""
    _register()
    experts.afa = branches
    experts.config = _OwnImplementation(experts.config)


def detach(experts: nn.Module) -> None:
    """Undo :func:`attach`."""
    del experts.afa
    experts.config = experts.config.of_model


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
