"""AnnealSchedule: alpha_t as a pure function of the optimizer step."""

import math
import weakref
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from torch import nn

from afa_kernels.alpha_t import annealed_in, begin, places_of, set_alpha_t_of
from afa_kernels.operator import checks

Blend = Callable[[float], float]


def _exponential(progress: float, sharpness: float) -> float:
    floor = math.exp(-sharpness)
    return (math.exp(-sharpness * progress) - floor) / (1.0 - floor)


def _sigmoid(progress: float, sharpness: float) -> float:
    def falling(p: float) -> float:
        return 1.0 / (1.0 + math.exp(sharpness * (p - 0.5)))

    return (falling(progress) - falling(1.0)) / (falling(0.0) - falling(1.0))


# For each kind: blend(progress, option), the name of the option, and its default. A blend falls from 1 at progress 0 to
# 0 at progress 1; step and constant reach 0 there by a jump.
KINDS: dict[str, tuple[Callable[[float, Any], float], str | None, Any]] = {
    "linear": (lambda p, _: 1.0 - p, None, None),
    "cosine": (lambda p, _: 0.5 * (1.0 + math.cos(math.pi * p)), None, None),
    "exponential": (_exponential, "sharpness", 5.0),
    "polynomial": (lambda p, power: (1.0 - p) ** power, "power", 2.0),
    "sigmoid": (_sigmoid, "sharpness", 10.0),
    "step": (lambda p, steps: 1.0 - math.floor(p * steps) / steps, "steps", 4),
    "constant": (lambda p, _: 1.0, None, None),
}
_MAX_SHARPNESS = 500.0  # exp() of it is still finite
_CALLABLE = "callable"  # the kind that state_dict stores for a function, which itself is not stored


class AnnealSchedule:
    """The annealing schedule ``alpha_t(step) = end + (start - end) * blend(progress)``.

    ``progress`` runs from 0 at step ``begin_frac * total_steps`` to 1 at step ``end_frac *
    total_steps``. Up to the first alpha_t is exactly ``start``, from the second on exactly ``end``,
    whatever the kind.

    Args:
        total_steps: optimizer steps of the whole training, at least 1.
        kind: ``"linear"``; ``"cosine"``; ``"exponential"`` (``sharpness=5``); ``"polynomial"``
            (``power=2``); ``"sigmoid"`` (``sharpness=10``); ``"step"`` (``steps=4`` equal drops);
            ``"constant"`` (start, then one drop to end); or a function ``blend(progress)`` with
            values in [0, 1], 1 meaning start and 0 meaning end.
        start, end: alpha_t before and after annealing, in [0, 1].
        begin_frac, end_frac: the annealed part of training, ``0 <= begin_frac <= end_frac <= 1``.
            The default leaves the last fifth of the steps at ``end``, where the branch is an
            ordinary LoRA.
        **options: the option of the kind, in brackets above.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is
            wanted.

    Example: ``sched = AnnealSchedule(1000); sched.attach(model)``, then ``sched.step()`` after each
    optimizer step.
    """

    def __init__(
        self,
        total_steps: int,
        kind: str | Blend = "linear",
        start: float = 1.0,
        end: float = 0.0,
        begin_frac: float = 0.0,
        end_frac: float = 0.8,
        **options: float,
    ):
        if isinstance(total_steps, bool) or not isinstance(total_steps, Integral):
            raise TypeError(f"total_steps: expected an int, got {type(total_steps).__name__}")
        if total_steps < 1:
            raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
        self.total_steps = int(total_steps)
        self.start = checks.alpha_value(start, "start")
        self.end = checks.alpha_value(end, "end")
        self.begin_frac = _fraction("begin_frac", begin_frac)
        self.end_frac = _fraction("end_frac", end_frac)
        if self.begin_frac > self.end_frac:
            raise ValueError(f"begin_frac: expected at most end_frac={end_frac}, got {begin_frac}")
        self.kind, self._function, self.options = _resolve(kind, options)
        self._begin = _boundary(self.begin_frac, self.total_steps)
        self._end = _boundary(self.end_frac, self.total_steps)
        self._step = 0
        # The adapters of each layer that it drives, None for one without a name.
        self._layers: weakref.WeakKeyDictionary[nn.Module, set[str | None]] = weakref.WeakKeyDictionary()

    def __call__(self, step: int) -> float:
        """Return alpha_t at optimizer step ``step`` (0 before the first); steps past
        ``total_steps`` give ``end``."""
        if isinstance(step, bool) or not isinstance(step, Integral):
            raise TypeError(f"step: expected an int, got {type(step).__name__}")
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        if step >= self._end:
            return self.end
        if step <= self._begin:
            return self.start
        blend = self._blend((step - self._begin) / (self._end - self._begin))
        if isinstance(blend, bool) or not isinstance(blend, Real) or not 0.0 <= blend <= 1.0:
            raise ValueError(f"kind: expected a function with values in [0, 1], got {blend!r} at step {step}")
        alpha_t = self.end + (self.start - self.end) * float(blend)
        # Rounding must not carry the value past either end.
        return min(max(alpha_t, min(self.start, self.end)), max(self.start, self.end))

    @property
    def current_step(self) -> int:
        """The number of optimizer steps taken."""
        return self._step

    @property
    def alpha_t(self) -> float:
        """The value at the current step."""
        return self(self._step)

    def attach(self, model: nn.Module, adapter: str | None = None) -> "AnnealSchedule":
        """Drive every layer of ``model`` that has ``set_alpha_t``: set the current value now and at
            each step.

        Layers are remembered weakly: attaching keeps no model alive, and copies of it are not
        followed. An adapter that is finished, at alpha_t = 0, stays so; one that stands elsewhere than
        the schedule jumps, with a warning. A new adapter may begin anywhere.

        Args:
            adapter: drive this adapter alone; by default all adapters, and in a PEFT model those that are active now.

        Raises:
            ValueError: no layer of ``model`` has ``set_alpha_t``, none has the adapter, or those that are active are
                plain LoRA.

        Warns:
            UserWarning: an adapter is finished or jumps; the message says how to mean it.
        """
        for place in begin(places_of(model, adapter), self.alpha_t, change_at(self, self._step)):
            self._layers.setdefault(place.layer, set()).add(place.adapter)
        return self

    def step(self) -> float:
        """Count one optimizer step, write the new alpha_t into the attached layers and return
        it."""
        self._step += 1
        return self._write()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the definition of the schedule as plain values; a function is stored
        as "callable"."""
        return {"step": self._step, **self.definition()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved step, so that the sequence of alpha_t goes on as it would have.

        Raises:
            ValueError: ``state`` lacks an entry or was saved by a schedule of another definition.
        """
        wanted = self.definition()
        missing = (wanted.keys() | {"step"}) - state.keys()
        if missing:
            raise ValueError(f"state: not a state of an AnnealSchedule, {', '.join(sorted(missing))} missing")
        for name, value in wanted.items():
            if state[name] != value:
                raise ValueError(f"state: saved with {name}={state[name]!r}, this schedule has {name}={value!r}")
        step = state["step"]
        if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
            raise ValueError(f"state: expected step to be an int of 0 or more, got {step!r}")
        self._step = int(step)
        self._write()

    def _blend(self, progress: float) -> float:
        if self._function is not None:
            return self._function(progress)
        blend, option, _ = KINDS[self.kind]
        return blend(progress, self.options.get(option))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": None}  # a copy drives no layers until it is attached

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._layers = weakref.WeakKeyDictionary()

    def definition(self) -> dict[str, Any]:
        """Return the arguments as plain values; a function is "callable"."""
        names = ("total_steps", "kind", "start", "end", "begin_frac", "end_frac")
        return {**{name: getattr(self, name) for name in names}, "options": dict(self.options)}

    def _write(self) -> float:
        alpha_t = self.alpha_t
        for layer, adapters in self._layers.items():
            for adapter in adapters:
                if annealed_in(layer, adapter):  # it may have been deleted
                    set_alpha_t_of(layer, alpha_t, adapter)
        return alpha_t

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.definition().items() if name != "options")
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"AnnealSchedule({arguments}{options})"


def change_at(schedule: Callable[[int], float], step: int) -> float:
    """Return by how much ``schedule`` changes alpha_t in the steps before and after ``step``, the larger of the two."""
    here = schedule(step)
    return max(abs(schedule(near) - here) for near in (max(step - 1, 0), step + 1))


def _resolve(kind: str | Blend, options: dict[str, float]) -> tuple[str, Blend | None, dict[str, float]]:
    """Return the name of a kind, the function if it is one, and the options in full."""
    if not isinstance(kind, str):
        if not callable(kind):
            raise TypeError(f"kind: expected a name or a function, got {type(kind).__name__}")
        if options:
            raise TypeError(f"kind: a function takes no options, got {', '.join(options)}")
        return _CALLABLE, kind, {}
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)} or a function, got {kind!r}")
    _, option, default = KINDS[kind]
    unknown = options.keys() - {option}
    if unknown:
        takes = f"takes {option}" if option else "takes no options"
        raise TypeError(f"AnnealSchedule: kind {kind!r} {takes}, got {', '.join(sorted(unknown))}")
    if option is None:
        return kind, None, {}
    value = options.get(option, default)
    if isinstance(value, bool) or not isinstance(value, Integral if option == "steps" else Real):
        raise TypeError(f"{option}: expected {'an int' if option == 'steps' else 'a float'}, got {value!r}")
    if not 0.0 < value < math.inf or (option == "sharpness" and value > _MAX_SHARPNESS):
        limit = f" up to {_MAX_SHARPNESS:g}" if option == "sharpness" else ""
        raise ValueError(f"{option}: expected a positive number{limit}, got {value}")
    return kind, None, {option: value}


def _fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a float in [0, 1], got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a fraction in [0, 1], got {value}")
    return float(value)


def _boundary(fraction: float, total_steps: int) -> float:
    """Return ``fraction * total_steps``; 0.7 * 10 is 7, not the 7.000000000000001 that step 7 would
    not reach."""
    exact = fraction * total_steps
    return float(round(exact)) if math.isclose(exact, round(exact), rel_tol=1e-12) else exact
