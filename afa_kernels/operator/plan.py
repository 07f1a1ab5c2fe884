"""``plan``: what a call would do, without doing it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from afa_kernels.backend import choice, interface
from afa_kernels.operator import checks, frozen, ops
from afa_kernels.operator.functional import alpha_of, autocast, of_owners, options_of
from afa_kernels.operator.options import Options, at_identity


@dataclass(frozen=True)
class Plan:
    """What a call does.

    Attributes:
        backend: name of the backend that runs the branch; ``"torch"`` where the frozen GEMM is all
            there is.
        path: ``"fused"`` (branch with its activation), ``"gemm"`` (alpha_t is 0: the two products
            alone, by torch's GEMMs or in the kernels of the backend) or ``"merged"`` (the branch is
            part of the frozen weight: that one GEMM). Of an MLP (:func:`afa_kernels.plan_mlp`), ``"block"`` (one call)
            or ``"parts"`` (its layers one by one).
        reason: why this backend and path, with what stood against the ones before it.
        launches: the kernels of a forward and a backward with their launch parameters, where the
            backend tells them.
        frozen: of a call by owner with a weight, how the rows of each owner are multiplied with it, and why:
            "grouped_mm: it reads the offsets on the device", or "fused" where the backend makes that product too. Of a
            layer whose weight is quantized, whether it is dequantized for the product, or why not.
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
    backend: str | None = None,
    offsets: Tensor | None = None,
    ranks: Tensor | None = None,
    weight: Tensor | None = None,
    **_shared: object,
) -> Plan:
    """Return what :func:`afa_lora` (or :func:`afa_linear`) would do with these arguments.

    Args:
        x, lora_a, lora_b, alpha_t, activation, scaling, dropout_p, backend, offsets, ranks, weight: as in these;
            ``weight`` changes nothing without ``offsets``.
        **_shared: ``base``, ``inplace``, ``dropout_seed`` and ``bias`` are accepted and change nothing.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the call itself would.
    """
    unknown = _shared.keys() - {"base", "inplace", "dropout_seed", "bias"}
    if unknown:
        raise TypeError(f"plan: unexpected arguments {', '.join(sorted(unknown))}")
    if offsets is None:
        options = options_of(activation, scaling, dropout_p, backend, ranks)
        return plan_of(x, lora_a, lora_b, alpha_of(alpha_t) is None, options)
    x = autocast("x", x.detach())
    checks.by_owner(x, lora_a, lora_b, offsets, ranks)
    alpha_t, options, _ = of_owners(x, alpha_t, scaling, activation, dropout_p, backend, offsets, ranks)
    options = at_identity(options) if alpha_t is None else options
    if weight is not None:
        weight = autocast("weight", weight.detach())
        checks.frozen_by_owner(x, weight, None, *lora_b.shape[:2])
    return _planned(ops.call_of(x, lora_b, options.spec), alpha_t is None, options, x, weight)


def plan_of(x: Tensor, lora_a: Tensor, lora_b: Tensor, identity: bool, options: Options) -> Plan:
    """:func:`plan` with options that are checked already: what layers call."""
    checks.branch(x, lora_a, lora_b)
    rows = autocast("x", x.detach()).reshape(-1, x.shape[-1])
    if identity:
        options = at_identity(options)
    return _planned(ops.call_of(rows, lora_b, options.spec), identity, options)


def _planned(
    call: interface.Call, identity: bool, options: Options, x: Tensor | None = None, weight: Tensor | None = None
) -> Plan:
    chosen, reason = choice.select(call, choice.requested(options.backend))
    launches = () if call.m == 0 else tuple(chosen.launches(call))
    way = "" if weight is None else _way(chosen, x, weight, call.r)
    return Plan(chosen.name, "gemm" if identity else "fused", reason, launches, way)


def _way(backend: interface.Backend, x: Tensor, weight: Tensor, r: int) -> str:
    """Return how the rows of all owners are multiplied with their weights, and why."""
    fused = backend.multiplies(x, weight, r)
    if fused:
        return f"fused: {fused}"
    forward, backward = (": ".join(frozen.way_of(x, matrices)) for matrices in (weight.mT, weight))
    return forward if forward == backward else f"forward {forward}; backward {backward}"
