"""alpha_t: as a module keeps it, and of a whole model.

A module keeps a tensor that kernels read, its value as a number, and whether it is 0. This is where alpha_t of an
adapter stands: schedules, callbacks, files and configurations read it here.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afa_kernels.operator import checks

_SMALLEST = torch.finfo(torch.float32).tiny  # below it the float32 buffer would be subnormal or 0


class Annealed(nn.Module):
    """Base of the modules that have an alpha_t: the branches of this package, and an adapter in a layer of PEFT.

    ``alpha_t_buffer`` is 0-dim and float32 on every device and in every dtype that the module is cast to. It is written
    in place, so that a new value neither recompiles a compiled model nor waits for the device. ``identity`` is a Python
    flag that changes only when 0 is reached or left: a compiled model is guarded on it alone, and recompiles then.
    ``is_fresh`` tells that nobody has set or loaded alpha_t yet, so that it may begin anywhere.
    """

    def start_alpha_t(
        self, value: float, device: torch.device | None, *, persistent: bool, is_fresh: bool = True
    ) -> None:
        """Make the buffer, in ``__init__``; ``persistent`` as in ``register_buffer``."""
        self.is_fresh = is_fresh
        buffer = torch.full((), value, dtype=torch.float32, device=device)
        self.register_buffer("alpha_t_buffer", buffer, persistent=persistent)
        self._alpha_t = value
        self.identity = value == 0.0

    @property
    def alpha_t(self) -> float:
        """The blend coefficient as a Python number; reading it does not touch the device."""
        return self._alpha_t

    def coefficient(self) -> Tensor | None:
        """Return what the operator takes: None at identity, where there is no activation."""
        return None if self.identity else self._buffers["alpha_t_buffer"]

    def annealed(self, adapter: str | None = None) -> "dict[str | None, Annealed]":
        """Return what has an alpha_t here, by the name of its adapter. A layer with several adapters has one for
        each; ``adapter`` asks for that one alone."""
        return {None: self} if adapter is None else {}

    def write_alpha_t(self, value: float) -> None:
        """Set the blend coefficient to a checked value. One that float32 cannot hold as a normal number becomes 0."""
        value = normal(value)
        with torch.no_grad():
            self.alpha_t_buffer.fill_(value)
        self._note_alpha_t(value)

    def _note_alpha_t(self, value: float) -> None:
        self._alpha_t = value
        if self.is_fresh:
            self.is_fresh = False
        if self.identity != (value == 0.0):  # written only on a change: compiled code guards on it
            self.identity = value == 0.0

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        buffer = self.alpha_t_buffer
        if buffer.dtype != torch.float32:  # cast to 16 bit it has lost digits
            self.alpha_t_buffer = torch.full((), self._alpha_t, dtype=torch.float32, device=buffer.device)
        elif buffer.device.type != "meta":
            with torch.no_grad():
                buffer.fill_(self._alpha_t)  # to_empty() leaves it undefined
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = prefix + "alpha_t_buffer"
        alpha = None if "alpha_t_buffer" in self._non_persistent_buffers_set else state_dict.get(key)
        try:
            value = self._alpha_t if alpha is None else checks.alpha_value(float(alpha), key)
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.alpha_t_buffer.dtype != torch.float32:  # load_state_dict(assign=True) takes the dtype that it finds
            self.alpha_t_buffer = self.alpha_t_buffer.to(torch.float32)
        if alpha is not None:
            self._note_alpha_t(value)


def normal(value: float) -> float:
    """Return ``value``, or 0 where float32 cannot hold it as a normal number."""
    return 0.0 if value < _SMALLEST else value


# What integrations do to a model before its adapters are looked for.
preparations: list[Callable[[nn.Module], object]] = []


class Place(NamedTuple):
    """One adapter in one layer, as what drives alpha_t sees it."""

    name: str
    layer: nn.Module
    adapter: str | None  # None: the layer has one alone, without a name
    state: nn.Module  # has its alpha_t

    def set_alpha_t(self, value: float) -> None:
        set_alpha_t_of(self.layer, value, self.adapter)


def takes_alpha_t(module: nn.Module) -> bool:
    return callable(getattr(module, "set_alpha_t", None))


def set_alpha_t_of(layer: nn.Module, value: float, adapter: str | None) -> None:
    """Set alpha_t of a layer, or of one adapter in it."""
    if adapter is None:
        layer.set_alpha_t(value)
    else:
        layer.set_alpha_t(value, adapter)


def places_of(model: nn.Module, adapter: str | None = None) -> list[Place]:
    """Return where ``model`` has an alpha_t: in every layer with ``set_alpha_t``, of PEFT the active adapters; with
    ``adapter``, where that one has.

    Raises:
        ValueError: no layer of ``model`` has ``set_alpha_t``, or none has the adapter.
    """
    for prepare in preparations:
        prepare(model)
    layers = [(name, module) for name, module in model.named_modules() if takes_alpha_t(module)]
    if not layers:
        raise ValueError(
            f"model: expected layers with set_alpha_t, found none in {type(model).__name__}; adapt it with "
            "afa_kernels.inject or an AFALoraConfig"
        )
    places = [
        Place(name, layer, own, state) for name, layer in layers for own, state in annealed_in(layer, adapter).items()
    ]
    if adapter is not None and not places:
        raise ValueError(f"adapter: no layer of {type(model).__name__} has an adapter {adapter!r} that can be annealed")
    return places


def annealed_in(layer: nn.Module, adapter: str | None) -> dict[str | None, nn.Module]:
    """Return what :meth:`Annealed.annealed` returns; a layer without it has one adapter, without a name."""
    if hasattr(layer, "annealed"):
        return layer.annealed(adapter)
    return {None: layer} if adapter is None else {}


def begin(places: list[Place], value: float, change: float, *, resumed: bool = False) -> list[Place]:
    """Set alpha_t of ``places`` to ``value``, with which an annealing begins, and return those that it drives.

    Args:
        change: what one step of the annealing changes: further away is a jump.
        resumed: ``places`` stand where they were left, which need not be where the adapters that were loaded stood.

    An adapter at 0 that somebody set or loaded is finished, and left out.

    Raises:
        ValueError: there is nothing to anneal.

    Warns:
        UserWarning: an adapter is left out, or its alpha_t jumps.
    """
    if not places and value != 0.0:
        raise ValueError("model: no active adapter is annealed; the adapters that train are plain LoRA")
    driven = []
    for adapter in dict.fromkeys(place.adapter for place in places):
        own = [place for place in places if place.adapter == adapter]
        named = "the adapter" if adapter is None else f"the adapter {adapter!r}"
        finished = all(place.state.alpha_t == 0.0 and not _is_fresh(place) for place in own)
        if value != 0.0 and finished and not resumed:
            warnings.warn(
                f"alpha_t: {named} is finished and stays at alpha_t = 0, where the schedule is at {value:g}. To anneal "
                f"it once more, call afa_kernels.set_alpha_t(model, {value:g}) before the annealing begins",
                stacklevel=3,
            )
            continue
        _warn_of_jump(named, own, value, change)
        driven += own
    for place in driven:
        place.set_alpha_t(value)
    return driven


def _is_fresh(place: Place) -> bool:
    return getattr(place.state, "is_fresh", True)


def _warn_of_jump(named: str, places: list[Place], value: float, change: float) -> None:
    rounding = 1e-6  # alpha_t may have been through float32
    far = [place for place in places if not _is_fresh(place) and abs(place.state.alpha_t - value) > change + rounding]
    if far:
        stands = far[0].state.alpha_t
        rest = f" (and {len(far) - 1} others)" if len(far) > 1 else ""
        warnings.warn(
            f"alpha_t: {named} stands at {stands:g} in {far[0].name or 'the layer'}{rest} and jumps to {value:g}, "
            f"where the schedule is. To go on from there, give the schedule start={stands:g}, or, where a training is "
            "resumed, load_state_dict before attach; to jump on purpose, call "
            f"afa_kernels.set_alpha_t(model, {value:g}) before",
            stacklevel=4,
        )


def set_alpha_t(model: nn.Module, value: float, adapter: str | None = None) -> None:
    """Set the blend coefficient of every layer of ``model`` that has ``set_alpha_t``: AFA layers,
    and the layers of a PEFT model with an :class:`afa_kernels.peft.AFALoraConfig`.

    Args:
        adapter: of this adapter alone; by default of all adapters, and in a PEFT model of the active ones.

    Raises:
        TypeError, ValueError: ``value`` is no number in [0, 1], is not 0 while a layer is merged,
            or the model has no such layer. No layer is changed then.
    """
    places = places_of(model, adapter)
    value = checks.alpha_value(value)
    merged = [place.name for place in places if place.layer.merged]
    if merged and value != 0.0:
        raise ValueError(
            f"alpha_t: {merged[0]} is merged, got {value}; unmerge the model first (afa_kernels.unmerge, or "
            "unmerge_adapter of a model of PEFT)"
        )
    if not places and value != 0.0:
        raise ValueError(f"model: no active adapter is annealed; the active adapters are plain LoRA, got {value}")
    for place in places:
        place.set_alpha_t(value)
