"""What a backend is: :class:`Backend`, and what it is told of a call.

A backend computes on flat, checked operands: ``x (M, K)``, ``a (r, K)``, ``b (N, r)``, ``dy (M, N)``, of any strides.
``alpha_t`` is a 0-dim float32 and ``seed`` a 0-dim int64 tensor (None without dropout), both on the device of ``x``.
Where rows have owners (:class:`Rows`), each of the G owners has its own branch: ``a (G, r, K)``, ``b (G, N, r)`` and
``alpha_t (G,)``.
At identity ``spec.activation`` is IDENTITY (activation.py) and ``alpha_t`` None. Products accumulate in float32
(float64 for float64) from operands rounded to ``x.dtype``; ``z`` is stored in ``x.dtype``, rounded before phi, so that
forward and backward see the same one.
Nothing that a caller owns is written, except ``out``.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afa_kernels.operator.options import Spec


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


class Rows(NamedTuple):
    """Whose rows of x are whose, sorted by owner: owner g has the rows ``offsets[g - 1]`` (0 for the first) to
    ``offsets[g] - 1``. All tensors are on the device of x."""

    offsets: Tensor  # (G,) int32, does not decrease
    ranks: Tensor | None  # (G,) int32, from 0 to r; None: all r
    scaling: Tensor | None  # (G,) float32; None: spec.scaling for all


class Member(NamedTuple):
    """What one layer brings to a call on the x that it shares with others: operands as in :meth:`Backend.forward`. N,
    r, scaling, activation and the dtypes of A and B may differ from member to member; ``spec.dropout`` is 0."""

    a: Tensor
    b: Tensor
    alpha_t: Tensor | None
    spec: Spec


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, why not if it cannot, and what it found (versions,
    instruction sets)."""

    available: bool
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.available


class Backend:
    """An implementation of the operator: a subclass in a module of its own, registered by builtin.py.

    A backend says what it is (the attributes), what it takes (``status``, ``refuses``, ``leaves``, ``gemm_first``,
    ``multiplies``) and computes: ``forward``, ``backward`` and, where it takes layers that share x together,
    ``forward_shared`` and ``backward_shared``; where it takes the frozen weights of rows by owner, ``linear_forward``
    and ``linear_backward``.
    """

    name: str
    devices: frozenset[str] = frozenset()  # of torch's device types; empty: every device
    automatic = True  # False: only where the caller names it
    takes_owners = True  # whether forward and backward take rows
    takes_shared_input = False  # whether there are forward_shared and backward_shared
    takes_weights = False  # whether there are linear_forward and linear_backward

    def status(self) -> BackendStatus:
        """Return whether this backend can run on this machine. May initialize a driver."""
        return BackendStatus(True, details={"torch": torch.__version__})

    def refuses(self, call: Call) -> str | None:
        """Return why this backend cannot take a call that its devices and status allow; None if it can."""
        return None

    def refuses_together(self, calls: list[Call]) -> str | None:
        """Return why this backend cannot take the calls of layers that share x together, each of which it can take
        alone; None if it can."""
        return None

    def leaves(self, call: Call) -> tuple[str, str] | None:
        """For a call that this backend can take, but for which another one is the better choice: return the name of
        that one, and the reason, which ``plan`` shows; else None. Not asked where the caller names a backend."""
        return None

    def gemm_first(self, spec: Spec, dtype: torch.dtype, backward: bool) -> bool:
        """Return whether the GEMM of a frozen layer runs before the branch, which then accumulates into its result;
        ``dtype`` is that of x. operator/frozen.py explains the two orders."""
        return False

    def multiplies(self, x: Tensor, weight: Tensor, r: int) -> str | None:
        """Of rows by owner of rank r with a frozen ``weight (E, N, K)`` or ``(N, K)``: return why
        :meth:`linear_forward` and :meth:`linear_backward` run, which make its product too. None: torch makes that.
        ``x`` is x or dy, of which rows, dtype and device count."""
        return None

    def launches(self, call: Call) -> list[dict[str, Any]]:
        """Return the kernels of a forward and a backward with their launch parameters, which ``plan`` shows."""
        return []

    def forward(
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
        """Write ``base + scaling * phi(dropout(x) @ a.T) @ b.T`` into ``out`` and return ``z (M, r)`` if asked for.

        ``base`` is None (zero), ``out`` itself (accumulate), or another ``(M, N)`` tensor of any
        strides, which is only read; a bias comes as a base whose row stride is 0. ``out`` may hold
        anything, NaN included, when it is not base.

        The rows of each owner have the bits of a call with that owner alone. z is zero beyond the rank of an owner. The
        dropout mask is that of the whole x. Rows behind the last offset have no owner: their branch is zero, and so is
        their z.
        """
        raise NotImplementedError

    def backward(
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
        raise NotImplementedError

    def forward_shared(
        self, x: Tensor, members: list[Member], *, bases: list[Tensor | None], outs: list[Tensor], save_z: bool
    ) -> list[Tensor] | None:
        """Do for each member what :meth:`forward` does, reading x once; return the z of each if asked for.

        The z of a member has the bits that the member alone would give it, where the bits of a product do not depend on
        its sizes (those of torch's GEMMs do).
        """
        raise NotImplementedError

    def backward_shared(
        self,
        dys: list[Tensor],
        x: Tensor,
        members: list[Member],
        zs: list[Tensor],
        *,
        need_dx: bool,
        need_da: list[bool],
        need_db: list[bool],
        dx: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """Return dx, the sum of what :meth:`backward` gives for each member, and every da and db, reading x once.

        A given ``dx`` is accumulated into, as in :meth:`backward`.
        """
        raise NotImplementedError

    def linear_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        alpha_t: Tensor | None,
        seed: Tensor | None,
        spec: Spec,
        rows: Rows,
        *,
        save_z: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``y (M, N) = x @ weight[e].T + bias[e]`` with the branch of :meth:`forward`, rounded once, and z if
        asked for.

        ``weight`` is (E, N, K), each matrix for ``G / E`` owners in a row, or (N, K), and ``bias`` None, (E, N) or
        (N,). Where each owner has a matrix, y of rows behind the last offset is undefined.
        """
        raise NotImplementedError

    def linear_backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        z: Tensor,
        alpha_t: Tensor | None,
        seed: Tensor | None,
        spec: Spec,
        rows: Rows,
        *,
        need_da: bool,
        need_db: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return dx, ``dy @ weight[e]`` and the branch's part, rounded once, and da and db as :meth:`backward` does."""
        raise NotImplementedError

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
