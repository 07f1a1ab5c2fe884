"""What a backend is, which ones exist, and which one takes a call.

A backend computes on flat, checked operands: ``x (M, K)``, ``a (r, K)``, ``b (N, r)``, ``dy (M, N)``, of any strides.
``alpha_t`` is a 0-dim float32 and ``seed`` a 0-dim int64 tensor (None without dropout), both on the device of ``x``.
Where rows have owners (:class:`Rows`), each of the G owners has its own branch: ``a (G, r, K)``, ``b (G, N, r)`` and
``alpha_t (G,)``.
At identity ``spec.activation`` is IDENTITY (activation.py) and ``alpha_t`` None. Products accumulate in float32
(float64 for float64) from operands rounded to ``x.dtype``; ``z`` is stored in ``x.dtype``, rounded before phi, so that
forward and backward see the same one.
Nothing that a caller owns is written, except ``out``.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from afa_kernels.backend import native
from afa_kernels.options import Spec

ENVIRONMENT_VARIABLE = "AFA_KERNELS_BACKEND"


class BackendUnavailable(ValueError):
    """A backend was asked for by name and cannot take the call; the message says why."""


class Call(NamedTuple):
    """All that the choice of a backend may depend on."""

    device: str  # torch's device type
    dtype: torch.dtype
    m: int
    k: int
    n: int
    r: int
    activation: str
    dropout: bool = False
    device_index: int | None = None
    owners: int = 0  # of rows, each with its own A and B; 0: one owner has all rows


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, why not if it cannot, and what it found (versions,
    instruction sets)."""

    available: bool
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.available


class Rows(NamedTuple):
    """Whose rows of x are whose, sorted by owner: owner g has the rows ``offsets[g - 1]`` (0 for the first) to
    ``offsets[g] - 1``. All tensors are on the device of x."""

    offsets: Tensor  # (G,) int32, does not decrease
    ranks: Tensor | None  # (G,) int32, from 0 to r; None: all r
    scaling: Tensor | None  # (G,) float32; None: spec.scaling for all


class Forward(Protocol):
    def __call__(
        self,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        alpha_t: Tensor | None,
        seed: Tensor | None,
        spec: Spec,
        rows: Rows | None = None,
        *,
        base: Tensor | None,
        out: Tensor,
        save_z: bool,
    ) -> Tensor | None:
        """Write ``base + scaling * phi(dropout(x) @ a.T) @ b.T`` into ``out`` and return ``z (M,
        r)`` if asked for.

        ``base`` is None (zero), ``out`` itself (accumulate), or another ``(M, N)`` tensor of any
        strides, which is only read; a bias comes as a base whose row stride is 0. ``out`` may hold
        anything, NaN included, when it is not base.

        The rows of each owner have the bits of a call with that owner alone. z is zero beyond the rank of an owner. The
        dropout mask is that of the whole x. Rows behind the last offset have no owner: their branch is zero, and so is
        their z.
        """


class Backward(Protocol):
    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        z: Tensor,
        alpha_t: Tensor | None,
        seed: Tensor | None,
        spec: Spec,
        rows: Rows | None = None,
        *,
        need_dx: bool,
        need_da: bool,
        need_db: bool,
        dx: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return ``dx (M, K)`` in ``x.dtype``, ``da`` in ``a.dtype`` and ``db`` in ``b.dtype``, shaped as they are;
        None where not needed.

        ``z`` is what forward returned. A given ``dx``, which is packed, is accumulated into and returned (for a backend
        that says ``gemm_first`` of a backward, and for every one on a GPU whose rows have owners with a weight each);
        otherwise the result is a fresh tensor. Rows without an owner keep what dx holds. da and db are zero beyond the
        rank of an owner and for one without rows.
        """


class Member(NamedTuple):
    """What one layer brings to a call on the x that it shares with others: operands as in :class:`Forward`. N, r,
    scaling, activation and the dtypes of A and B may differ from member to member; ``spec.dropout`` is 0."""

    a: Tensor
    b: Tensor
    alpha_t: Tensor | None
    spec: Spec


class GroupForward(Protocol):
    def __call__(
        self, x: Tensor, members: list[Member], *, bases: list[Tensor | None], outs: list[Tensor], save_z: bool
    ) -> list[Tensor] | None:
        """Do for each member what :class:`Forward` does, reading x once; return the z of each if asked for.

        The z of a member has the bits that the member alone would give it, where the bits of a product do not depend on
        its sizes (those of torch's GEMMs do).
        """


class GroupBackward(Protocol):
    def __call__(
        self,
        dys: list[Tensor],
        x: Tensor,
        members: list[Member],
        zs: list[Tensor] | None,
        *,
        need_dx: bool,
        need_da: list[bool],
        need_db: list[bool],
        dx: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """Return dx, the sum of what :class:`Backward` gives for each member, and every da and db, reading x once.

        A given ``dx`` is accumulated into, as in :class:`Backward`.
        """


@dataclass(frozen=True)
class Backend:
    name: str
    devices: frozenset[str]  # empty: every device
    status: Callable[[], BackendStatus]
    forward: Forward
    backward: Backward
    # Why this backend cannot take a call that its device allows; None if it can.
    refuses: Callable[[Call], str | None] = lambda call: None
    # gemm_first(spec, dtype of x, whether it is the backward): whether the GEMM of a frozen layer runs before the
    # branch, which then accumulates into its result. backend/frozen.py explains the two orders.
    gemm_first: Callable[[Spec, torch.dtype, bool], bool] = lambda spec, dtype, backward: False
    automatic: bool = True  # False: only where the caller names it
    # What ``plan`` shows: the kernels of a call with their launch parameters.
    launches: Callable[[Call], list[dict[str, Any]]] | None = None
    # Layers that share x, in one pass over it; both or neither. ``refuses_group`` says of the members' calls, each of
    # which this backend can take alone, why it cannot take them together.
    group_forward: GroupForward | None = None
    group_backward: GroupBackward | None = None
    refuses_group: Callable[[list[Call]], str | None] = lambda calls: None
    takes_owners: bool = True  # whether forward and backward take rows
    # For a call that this backend can take, but for which another one is the better choice: the name of that one, and
    # the reason, which ``plan`` shows; else None. It is not asked where the caller names a backend.
    leaves: Callable[[Call], tuple[str, str] | None] | None = None

    def why_not(self, call: Call) -> str | None:
        """Return why this backend cannot take ``call``, or None if it can."""
        # The device comes first, because status() of a GPU backend initializes the driver.
        if self.devices and call.device not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))} tensors, got {call.device}"
        status = self.status()
        if not status.available:
            return status.reason
        if call.owners and not self.takes_owners:
            return "takes no rows by owner"
        return self.refuses(call)


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
    return explicit or _request.name or native.environment(ENVIRONMENT_VARIABLE) or None


def requested_in_trace(explicit: str | None) -> str | None:
    """:func:`requested` in a form that torch.compile can trace."""
    return explicit or _request.name or os.environ.get(ENVIRONMENT_VARIABLE) or None


def _left(backend: Backend, call: Call) -> str | None:
    """Return why ``backend`` leaves ``call`` to another one that can take it, or None."""
    left = backend.leaves(call) if backend.leaves is not None and not call.owners else None
    if left is None:
        return None
    name, reason = left
    other = _BACKENDS.get(name)
    return reason if other is not None and other.why_not(call) is None else None


@remembered
def select(call: Call, name: str | None) -> Selection:
    """Return the backend that takes ``call``: the named one, or the first in order that can.

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
def select_group(calls: tuple[Call, ...], name: str | None) -> tuple[Backend | None, str]:
    """Return the backend whose group passes take ``calls``, the calls of layers on one x, together; or None and why
    there is none.

    Raises:
        As :func:`select` for each of the calls.
    """
    chosen = {select(call, name).backend.name for call in calls}
    if len(chosen) > 1:
        return None, f"the members run on different backends ({', '.join(sorted(chosen))})"
    backend = get(chosen.pop())
    if backend.group_forward is None:
        return None, f"{backend.name} takes one layer at a time"
    if any(call.dropout for call in calls):
        return None, "dropout draws one mask for each layer"
    refused = backend.refuses_group(list(calls))
    return (backend, "") if refused is None else (None, f"{backend.name} {refused}")


def _describe(call: Call) -> str:
    dtype = str(call.dtype).removeprefix("torch.")
    owners = f"{call.owners} owners, " if call.owners else ""
    return f"{owners}M={call.m}, K={call.k}, N={call.n}, r={call.r}, {dtype}, {call.activation}, {call.device}"
