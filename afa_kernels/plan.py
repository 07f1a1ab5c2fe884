"""``plan``: what a call would do, without doing it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from afa_kernels import _ops, checks
from afa_kernels.backend import registry
from afa_kernels.functional import alpha_of, autocast
from afa_kernels.options import Options, at_identity
from afa_kernels.ragged import checks as ragged_checks
from afa_kernels.ragged import frozen
from afa_kernels.ragged.functional import groups_of, options_of


@dataclass(frozen=True)
class Plan:
    """What a call does.

    Attributes:
        backend: name of the backend that runs the branch; ``"torch"`` where the frozen GEMM is all
            there is.
        path: ``"fused"`` (branch with its activation), ``"gemm"`` (alpha_t is 0: the two products
            alone, by torch's GEMMs or in the kernels of the backend) or ``"merged"`` (the branch is
            part of the frozen weight: that one GEMM).
        reason: why this backend and path, with what stood against the ones before it.
        launches: the kernels of a forward and a backward with their launch parameters, where the
            backend tells them.
        frozen: of a ragged call with a weight, how the rows of each group are multiplied with it, and why:
            "bmm: groups of equally many rows ..".
    """

    backend: str
    path: str
    reason: str
    launches: tuple[dict[str, Any], ...] = ()
    frozen: str = ""


def plan(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha_t: float | Tensor,
    *,
    activation: str = "silu",
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    save: str = "z",
    backend: str | None = None,
    offsets: Tensor | None = None,
    ranks: Tensor | None = None,
    weight: Tensor | None = None,
    **_shared: object,
) -> Plan:
    """Return what :func:`afa_lora` (or :func:`afa_linear`) would do with these arguments; with ``offsets``, what
    :func:`afa_lora_grouped` (with ``weight``, :func:`afa_linear_grouped`) would.

    Args:
        x, lora_a, lora_b, alpha_t, activation, scaling, dropout_p, save, backend, offsets, ranks, weight: as in these;
            ``weight`` changes nothing without ``offsets``.
        **_shared: ``base``, ``inplace``, ``dropout_seed`` and ``bias`` are accepted and change nothing.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the call itself would.
    """
    unknown = _shared.keys() - {"base", "inplace", "dropout_seed", "bias"}
    if unknown:
        raise TypeError(f"plan: unexpected arguments {', '.join(sorted(unknown))}")
    if offsets is not None:
        options, scalings = options_of(activation, scaling, dropout_p, save, backend)
        return _ragged_plan(x, offsets, ranks, lora_a, lora_b, alpha_t, scalings, weight, options)
    options = checks.options(activation, scaling, dropout_p, save, backend)
    return plan_of(x, lora_a, lora_b, alpha_of(alpha_t) is None, options)


def plan_of(x: Tensor, lora_a: Tensor, lora_b: Tensor, identity: bool, options: Options) -> Plan:
    """:func:`plan` with options that are checked already: what layers call."""
    checks.branch(x, lora_a, lora_b)
    rows = autocast("x", x.detach()).reshape(-1, x.shape[-1])
    if identity:
        options = at_identity(options)
    return _planned(_ops.call_of(rows, lora_b, options.spec), identity, options)


def _ragged_plan(x, offsets, ranks, lora_a, lora_b, alpha_t, scalings, weight, options: Options) -> Plan:
    x = autocast("x", x.detach())
    ragged_checks.operands(x, offsets, lora_a, lora_b, ranks)
    way = ""
    if weight is not None:
        weight = autocast("weight", weight.detach())
        ragged_checks.frozen(x, weight, None, *lora_b.shape[:2])
        ends = frozen.ends_of(offsets, weight.shape[0]) if weight.dim() == 3 else offsets
        ways = frozen.way_of(x, ends, weight.mT), frozen.way_of(x, ends, weight)
        way = ": ".join(ways[0])
        if ways[1] != ways[0]:
            way = f"forward {way}; backward {': '.join(ways[1])}"
    identity = groups_of(x, offsets, ranks, alpha_t, scalings).alpha_t is None
    if identity:
        options = at_identity(options)
    return _planned(_ops.call_of(x, lora_b, options.spec), identity, options, way)


def _planned(call: registry.Call, identity: bool, options: Options, way: str = "") -> Plan:
    chosen, reason = registry.select(call, registry.requested(options.backend))
    launches = () if chosen.launches is None or call.m == 0 else tuple(chosen.launches(call))
    return Plan(chosen.name, "gemm" if identity else "fused", reason, launches, way)
