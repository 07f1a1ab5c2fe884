"""Callbacks that drive alpha_t by the optimizer step: :class:`AnnealCallback` for transformers' and
TRL's trainers, :class:`LightningAnnealCallback` for Lightning.

Each is imported when it is first asked for, and its framework with it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from afa_kernels.callbacks.lightning import LightningAnnealCallback
    from afa_kernels.callbacks.trainer import AnnealCallback

__all__ = ["AnnealCallback", "LightningAnnealCallback"]


def __getattr__(name: str) -> type:
    if name == "AnnealCallback":
        from afa_kernels.callbacks.trainer import AnnealCallback

        return AnnealCallback
    if name == "LightningAnnealCallback":
        from afa_kernels.callbacks.lightning import LightningAnnealCallback

        return LightningAnnealCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
