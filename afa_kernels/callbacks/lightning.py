"""The callback for Lightning, from either of its packages."""

import math
from collections.abc import Callable
from typing import Any

from afa_kernels.callbacks.annealer import Annealer

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("LightningAnnealCallback needs Lightning: pip install 'afa-kernels[lightning]'") from error


class LightningAnnealCallback(Callback):
    """Anneals alpha_t over ``fit``: ``Trainer(..., callbacks=[LightningAnnealCallback()])``.

    The twin of :class:`afa_kernels.callbacks.AnnealCallback`: alpha_t follows
    ``trainer.global_step``, which counts optimizer steps, and is logged as ``alpha_t``. The length
    of the training is ``trainer.estimated_stepping_batches``.

    Args:
        schedule, finish, merge, adapter, **options: as in :class:`afa_kernels.callbacks.AnnealCallback`.

    Raises:
        TypeError, ValueError: an argument does not fit, or (when training starts) its length is
            unknown and no ``schedule`` was given.
    """

    def __init__(
        self,
        schedule: Callable[[int], float] | None = None,
        *,
        finish: str = "force",
        merge: bool = False,
        adapter: str | None = None,
        **options: Any,
    ):
        self._annealer = Annealer(schedule, finish, merge, options, adapter)
        self._step = 0
        self._saved: dict[str, Any] | None = None

    @property
    def alpha_t(self) -> float | None:
        """The current value; None before training."""
        return self._annealer.alpha_t

    def on_train_start(self, trainer, pl_module):
        total_steps = trainer.estimated_stepping_batches
        if self._annealer.needs_total_steps and not 0 < total_steps < math.inf:
            raise ValueError(
                "schedule: the length of the training is unknown; set max_steps of the Trainer or "
                "pass an AnnealSchedule"
            )
        self._step = trainer.global_step
        self._annealer.begin(pl_module, total_steps, self._step, self._saved)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(adapter=self._annealer.adapter)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.alpha_t is None else self._annealer.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._annealer.set_step(self._step)
        pl_module.log(self._annealer.key, self.alpha_t)

    def on_train_end(self, trainer, pl_module):
        self._annealer.end(f"training ended after {self._step} optimizer steps")
