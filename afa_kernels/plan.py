"""``plan``: what a call would do, without doing it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from afa_kernels import _ops, checks
from afa_kernels.backend import registry
from afa_kernels.functional import alpha_of, autocast
from afa_kernels.options import Options, at_identity


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
    """

    backend: str
    path: str
    reason: str
    launches: tuple[dict[str, Any], ...] = ()


def plan(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha_t: float | Tensor,
    *,
    activation: str = "silu",
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    save: str = "z",
    backend: str | None = None,
    **_shared: object,
) -> Plan:
    """Return what :func:`afa_lora` (or :func:`afa_linear`) would do with these arguments.

    Args:
        As in :func:`afa_lora`; ``base``, ``inplace`` and ``dropout_seed`` are accepted and change
        nothing.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the call itself would.
    """
    unknown = _shared.keys() - {"base", "inplace", "dropout_seed"}
    if unknown:
        raise TypeError(f"plan: unexpected arguments {', '.join(sorted(unknown))}")
    options = checks.options(activation, scaling, dropout_p, save, backend)
    return plan_of(x, lora_a, lora_b, alpha_of(alpha_t) is None, options)


def plan_of(x: Tensor, lora_a: Tensor, lora_b: Tensor, identity: bool, options: Options) -> Plan:
    """:func:`plan` with options that are checked already: what layers call."""
    checks.branch(x, lora_a, lora_b)
    rows = autocast("x", x.detach()).reshape(-1, x.shape[-1])
    if identity:
        options = at_identity(options)
    call = _ops.call_of(rows, lora_b, options.spec)
    chosen, reason = registry.select(call, registry.requested(options.backend))
    launches = () if chosen.launches is None or call.m == 0 else tuple(chosen.launches(call))
    return Plan(chosen.name, "gemm" if identity else "fused", reason, launches)
