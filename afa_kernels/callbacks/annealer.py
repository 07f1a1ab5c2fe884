"""What the callbacks of all frameworks share: the schedule, the adapters, what a checkpoint says of them, and how
training ends."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from afa_kernels.alpha_t import Place, begin, places_of, takes_alpha_t
from afa_kernels.layers.kept import told_together
from afa_kernels.schedule import AnnealSchedule, change_at

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
        self._given = schedule
        self._options = options
        self._schedule: Callable[[int], float] | None = None
        self._described: dict[str, Any] = {}
        self._found: list[Place] = []  # the adapters
        self._places: list[Place] | None = None  # those that it drives
        self._layers: dict[str, nn.Module] = {}  # what it merges, by name

    @property
    def needs_total_steps(self) -> bool:
        return self._given is None

    @property
    def alpha_t(self) -> float | None:
        """The largest blend coefficient of the adapters that it drives, 0 if it drives none; None before training."""
        if self._places is None:
            return None
        return max((place.state.alpha_t for place in self._places), default=0.0)

    def begin(self, model: nn.Module, total_steps: int, step: int, saved: dict[str, Any] | None = None) -> None:
        """Find the adapters and set alpha_t for ``step``, 0 or that of the checkpoint; ``saved`` is what the checkpoint
        has of :meth:`state`, if it has it.

        Raises:
            ValueError: nothing in ``model`` can be annealed.

        Warns:
            UserWarning: the schedule is longer than the training, it or the activation is another one than in the
                checkpoint, or an adapter is finished or jumps (:meth:`AnnealSchedule.attach`).
        """
        places = places_of(model, self.adapter)
        self._layers = {name: module for name, module in model.named_modules() if takes_alpha_t(module)}
        self._schedule = self._given or self._made_for(total_steps)
        planned = getattr(self._schedule, "total_steps", total_steps)
        if planned > total_steps:
            warnings.warn(
                f"schedule: it is made for {planned} optimizer steps and the training has "
                f"{total_steps}, so alpha_t ends at {self._schedule(total_steps):g}",
                stacklevel=2,
            )
        self._found, self._described = places, self._describe(places)
        if saved is not None:
            self._compare(saved)
            for place in places:  # some frameworks load an adapter without its alpha_t
                if (place.adapter or "") in saved["alpha_t"]:
                    place.set_alpha_t(saved["alpha_t"][place.adapter or ""])
        resumed = step > 0 and saved is None
        self._places = begin(places, self._schedule(step), change_at(self._schedule, step), resumed=resumed)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to say of the annealing, as plain values."""
        stand: dict[str, float] = {}
        for place in self._found:
            name = place.adapter or ""
            stand[name] = max(stand.get(name, 0.0), place.state.alpha_t)
        return {"alpha_t": stand, **self._described}

    def _describe(self, places: list[Place]) -> dict[str, Any]:
        definition = getattr(self._schedule, "definition", None)
        activations = sorted({place.state.activation for place in places if hasattr(place.state, "activation")})
        return {"activations": activations, "schedule": None if definition is None else definition()}

    def _compare(self, saved: dict[str, Any]) -> None:
        """Warn where this run differs from the one that saved."""
        for what, way in (
            ("activations", "give the adapters the same activation"),
            ("schedule", "train for as many steps and give the callback or the configuration the same schedule"),
        ):
            was, now = saved[what], self._described[what]
            if was is None or now is None or was == now:
                continue
            if what == "schedule":
                differing = [name for name in now if was.get(name) != now[name]]
                was, now = (", ".join(f"{name}={each.get(name)!r}" for name in differing) for each in (was, now))
            warnings.warn(
                f"resume: the checkpoint was saved with the {what} {was}, and this training has {now}. To go on as "
                f"before, {way}",
                stacklevel=4,
            )

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
            with told_together(self._layers.items()):
                for layer in self._layers.values():
                    layer.merge()

    def _write(self, alpha_t: float) -> float:
        for place in self._places:
            place.set_alpha_t(alpha_t)
        return self.alpha_t

    def _made_for(self, total_steps: int) -> AnnealSchedule:
        if self._options:
            return AnnealSchedule(total_steps, **self._options)
        # A layer of a PEFT model makes the schedule that its adapter's configuration describes.
        own = (getattr(layer, "schedule", None) for layer in self._layers.values())
        made = (make(total_steps, self.adapter) for make in own if make is not None)
        configured = next((each for each in made if each is not None), None)
        return configured or AnnealSchedule(total_steps)
