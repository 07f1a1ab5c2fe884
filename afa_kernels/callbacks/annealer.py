"""What the callbacks of all frameworks share: the schedule, the layers, and how training ends."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from afa_kernels.schedule import AnnealSchedule, annealed_layers, set_alpha_t_of

FINISH = ("force", "warn")


class Annealer:
    """Sets alpha_t of a model's layers to ``schedule(step)``.

    Args:
        schedule: an :class:`AnnealSchedule` or a function of the optimizer step; by default one is
            made for the length of the training, from ``options`` if there are any, else from the
            :class:`~afa_kernels.peft.AFALoraConfig` of the model, else linear.
        finish: what to do when training ends before ``alpha_t = 0``: ``"force"`` sets it to 0 and
            warns, ``"warn"`` leaves it and warns.
        merge: merge the branches into the frozen weights at the end.
        options: arguments of :class:`AnnealSchedule` without ``total_steps``.
        adapter: anneal this adapter alone; by default all adapters, and in a PEFT model the active ones.
    """

    def __init__(
        self,
        schedule: Callable[[int], float] | None,
        finish: str,
        merge: bool,
        options: dict[str, Any],
        adapter: str | None = None,
    ):
        if finish not in FINISH:
            raise ValueError(f"finish: expected 'force' or 'warn', got {finish!r}")
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"schedule: expected an AnnealSchedule or a function of the step, got {type(schedule).__name__}"
            )
        if schedule is not None and options:
            raise TypeError(f"schedule: given already, got {', '.join(sorted(options))} too")
        if options:
            AnnealSchedule(1, **options)  # raises now, not when training starts, where an option is wrong
        if merge and adapter is not None:
            raise ValueError(f"merge: the layers have other adapters than {adapter!r}, got merge=True")
        self.finish = finish
        self.merge = merge
        self.adapter = adapter
        self.key = "alpha_t" if adapter is None else f"alpha_t/{adapter}"  # in a log
        self.alpha_t: float | None = None
        self._given = schedule
        self._options = options
        self._schedule: Callable[[int], float] | None = None
        self._layers: list[nn.Module] = []

    @property
    def needs_total_steps(self) -> bool:
        return self._given is None

    def begin(self, model: nn.Module, total_steps: int, step: int) -> None:
        """Find the layers and set alpha_t for ``step``, 0 or that of the checkpoint.

        Raises:
            ValueError: nothing in ``model`` can be annealed.
        """
        self._layers = annealed_layers(model, self.adapter)
        if not self._layers:
            raise ValueError(
                f"model: expected layers with set_alpha_t, found none in {type(model).__name__}; "
                "adapt it with afa_kernels.inject or an AFALoraConfig before training"
            )
        self._schedule = self._given or self._made_for(total_steps)
        planned = getattr(self._schedule, "total_steps", total_steps)
        if planned > total_steps:
            warnings.warn(
                f"schedule: it is made for {planned} optimizer steps and the training has "
                f"{total_steps}, so alpha_t ends at {self._schedule(total_steps):g}",
                stacklevel=2,
            )
        self.set_step(step)
        if self.adapter is None and self.alpha_t != 0.0 and all(layer.alpha_t == 0.0 for layer in self._layers):
            raise ValueError("model: no active adapter is annealed; the adapters that train are plain LoRA")

    def set_step(self, step: int) -> float:
        """Set alpha_t for the number of optimizer steps taken and return it."""
        return self._write(self._schedule(step))

    def end(self, what: str) -> None:
        """Bring alpha_t to 0 or warn, and merge; ``what`` says in a warning where training
        ended."""
        if self.alpha_t != 0.0:
            reached = f"{what}, at alpha_t = {self.alpha_t:g}"
            if self.finish == "warn":
                rest = ", so nothing was merged" if self.merge else ""
                warnings.warn(
                    f"{reached}: the branches are not linear and cannot be merged{rest}",
                    stacklevel=2,
                )
                return
            warnings.warn(
                f"{reached}; it was set to 0, which changes what the model computes: evaluate it again",
                stacklevel=2,
            )
            self._write(0.0)
        if self.merge:
            for layer in self._layers:
                layer.merge()

    def _write(self, alpha_t: float) -> float:
        self.alpha_t = alpha_t
        for layer in self._layers:
            set_alpha_t_of(layer, alpha_t, self.adapter)
        return alpha_t

    def _made_for(self, total_steps: int) -> AnnealSchedule:
        if self._options:
            return AnnealSchedule(total_steps, **self._options)
        # A layer of a PEFT model makes the schedule that its adapter's configuration describes.
        own = (getattr(layer, "schedule", None) for layer in self._layers)
        made = (make(total_steps, self.adapter) for make in own if make is not None)
        configured = next((each for each in made if each is not None), None)
        return configured or AnnealSchedule(total_steps)
