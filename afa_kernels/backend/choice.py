"""Which backend takes a call: the named one, or the first in order of registration that can."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from afa_kernels.backend import compiled, measured
from afa_kernels.backend.interface import Backend, BackendStatus, BackendUnavailable, Call

ENVIRONMENT_VARIABLE = "AFA_KERNELS_BACKEND"


class Selection(NamedTuple):
    backend: Backend
    reason: str


_BACKENDS: dict[str, Backend] = {}
_remembered: list[Any] = []


class _Request(threading.local):
    """The backend that use_backend asked for on this thread. Not a ContextVar: torch.compile cannot trace one, but
    compiles again when this attribute changes. Not a default in the class: there torch 2.6 sees the default alone."""

    def __init__(self):  # runs on every thread
        self.name: str | None = None


_request = _Request()


def register(backend: Backend) -> None:
    """Add a backend. The order of registration is the order of choice."""
    _BACKENDS[backend.name] = backend
    forget_choices()


def remembered(choice: Callable, *, typed: bool = False) -> Callable:
    """Decorate a function of a call whose result holds until another backend is registered.

    With ``typed``, arguments that are equal but of different types are different.
    """
    _remembered.append(lru_cache(maxsize=4096, typed=typed)(choice))
    return _remembered[-1]


def forget_choices() -> None:
    for choice in _remembered:
        choice.cache_clear()


def names() -> tuple[str, ...]:
    return tuple(_BACKENDS)


def get(name: str) -> Backend:
    return _BACKENDS[name]


def backends() -> dict[str, BackendStatus]:
    """Return the status of every backend by name, in the order in which they are chosen."""
    return {name: backend.status() for name, backend in _BACKENDS.items()}


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Request a backend for the calls inside the ``with`` block, as ``backend=`` does for one call.

    It holds on this thread, and for the backward of those calls wherever that runs.
    """
    check_name(name)
    before, _request.name = _request.name, name
    try:
        yield
    finally:
        _request.name = before


def check_name(name: str | None) -> None:
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)} or None, got {name!r}")


def requested(explicit: str | None) -> str | None:
    """Return the backend that was asked for: by the call, else by ``use_backend``, else by the
    environment."""
    return explicit or _request.name or compiled.environment(ENVIRONMENT_VARIABLE) or None


def requested_in_trace(explicit: str | None) -> str | None:
    """:func:`requested` in a form that torch.compile can trace."""
    return explicit or _request.name or os.environ.get(ENVIRONMENT_VARIABLE) or None


def _left(backend: Backend, call: Call) -> str | None:
    """Return why ``backend`` leaves ``call`` to another one that can take it, or None."""
    left = None if call.owners else backend.leaves(call)
    if left is None:
        return None
    name, reason = left
    other = _BACKENDS.get(name)
    return reason if other is not None and other.why_not(call) is None else None


@remembered
def select(call: Call, name: str | None) -> Selection:
    """Return the backend that takes ``call``: the named one, the one that was the fastest on this card, or the first in
    order that can.

    Raises:
        BackendUnavailable: ``name`` cannot take the call.
        ValueError: no backend is called ``name``.
    """
    check_name(name)
    if name is not None:
        why_not = _BACKENDS[name].why_not(call)
        if why_not is not None:
            raise BackendUnavailable(f"backend {name!r} cannot take this call: {why_not} (call: {_describe(call)})")
        return Selection(_BACKENDS[name], "requested")
    fastest = measured.choice_for(call)
    if fastest is not None:
        backend = _BACKENDS.get(fastest[0])
        if backend is not None and backend.why_not(call) is None:
            return Selection(backend, fastest[1])
    passed_over = []
    for backend in _BACKENDS.values():
        if not backend.automatic:
            continue
        why_not = backend.why_not(call) or _left(backend, call)
        if why_not is None:
            reason = "; ".join(passed_over) or "first choice for this device"
            return Selection(backend, reason)
        passed_over.append(f"{backend.name}: {why_not}")
    raise BackendUnavailable(f"no backend can take this call: {'; '.join(passed_over)} (call: {_describe(call)})")


@remembered
def select_together(calls: tuple[Call, ...], name: str | None) -> tuple[Backend | None, str]:
    """Return the backend that takes ``calls``, the calls of layers on one x, together; or None and why
    there is none.

    Raises:
        As :func:`select` for each of the calls.
    """
    chosen = {select(call, name).backend.name for call in calls}
    if len(chosen) > 1:
        return None, f"the members run on different backends ({', '.join(sorted(chosen))})"
    backend = get(chosen.pop())
    if not backend.takes_shared_input:
        return None, f"{backend.name} takes one layer at a time"
    if any(call.dropout for call in calls):
        return None, "dropout draws one mask for each layer"
    refused = backend.refuses_together(list(calls))
    return (backend, "") if refused is None else (None, f"{backend.name} {refused}")


def _describe(call: Call) -> str:
    dtype = str(call.dtype).removeprefix("torch.")
    owners = f"{call.owners} owners, " if call.owners else ""
    return f"{owners}M={call.m}, K={call.k}, N={call.n}, r={call.r}, {dtype}, {call.activation}, {call.device}"
