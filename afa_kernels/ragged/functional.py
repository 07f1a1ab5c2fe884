"""The operator on rows that are sorted by group, each group with its own A and B: experts of a mixture, or the adapters
of a batch."""

import torch
from torch import Tensor

from afa_kernels import _ops, functional, torch_private
from afa_kernels import checks as plain_checks
from afa_kernels.backend.registry import Groups
from afa_kernels.options import Options
from afa_kernels.ragged import checks, ops
from afa_kernels.ragged.autograd import AFALoRAGroupedFunction


def afa_lora_grouped(
    x: Tensor,
    offsets: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha_t: float | Tensor,
    *,
    activation: str = "silu",
    scaling: float | Tensor = 1.0,
    base: Tensor | None = None,
    inplace: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    save: str = "z",
    backend: str | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Return :func:`afa_kernels.afa_lora` of the rows of each group with the A and B of that group, in one call.

    The rows of x are sorted by group: group g has the rows ``offsets[g - 1]`` (0 for the first) to ``offsets[g] - 1``.
    A group may have none. The result for a group's rows and its gradients have the bits of a call with that group
    alone; where torch multiplies (the backends ``torch`` and ``reference``), as far as the bits of its GEMMs do not
    depend on where their operands lie.

    Args:
        x: ``(T, K)``, float64, float32, bfloat16 or float16; any strides. Under autocast it is rounded to the autocast
            dtype first.
        offsets: ``(G,)`` int32 on the device of x, where each group ends, as in ``torch.nn.functional.grouped_mm``.
            Rows behind the last one belong to no group: their branch is zero. Nothing waits for the device to read
            them, and torch.compile does not compile again when they change.
        lora_a: ``(G, r, K)``, of any floating dtype and strides, differentiable.
        lora_b: ``(G, N, r)``, likewise.
        alpha_t: float in [0, 1], or a float32 tensor with one value for all groups (0-dim) or for each ``(G,)``.
        scaling: a number, or a ``(G,)`` float32 tensor.
        base: ``(T, N)``, the output of the frozen layer, or None for 0.
        dropout_p, dropout_seed: as in :func:`afa_kernels.afa_lora`; the mask of an element depends on the seed, its row
            and its column alone, not on the groups.
        ranks: ``(G,)`` int32, the rank of each group, from 0 (no branch) to r. Rows of ``lora_a[g]`` and columns of
            ``lora_b[g]`` beyond it are not read, and their gradient is zero.
        activation, inplace, save, backend: as in :func:`afa_kernels.afa_lora`.

    Returns:
        ``(T, N)`` in the dtype of ``base`` if given, else of x.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is wanted. The values
            of ``offsets``, ``ranks``, ``alpha_t`` and ``scaling`` are checked where they are on a CPU.
        BackendUnavailable: ``backend`` was named and cannot take this call; the message says why.
    """
    options, scaling = options_of(activation, scaling, dropout_p, save, backend)
    plain_checks.seed(dropout_seed)
    x = functional.autocast("x", x)
    checks.operands(x, offsets, lora_a, lora_b, ranks)
    checks.base(base, x, lora_b.shape[1], inplace=inplace)
    groups = groups_of(x, offsets, ranks, alpha_t, scaling)
    accumulates = inplace and base.dtype == x.dtype and functional.can_accumulate(base, x, lora_a, lora_b)
    if base is None or accumulates or (base.dtype == x.dtype and not inplace):
        return _apply(x, None, None, lora_a, lora_b, base, groups, dropout_seed, options, inplace)
    # As in afa_lora: the base has another dtype, overlaps an operand, or the call is being traced.
    y = _apply(x, None, None, lora_a, lora_b, None, groups, dropout_seed, options, False)
    return base.add_(y) if inplace else base + y.to(base.dtype)


def afa_linear_grouped(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha_t: float | Tensor,
    *,
    activation: str = "silu",
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    save: str = "z",
    backend: str | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Return :func:`afa_kernels.afa_linear` of the rows of each group with the weight, A and B of that group, in one
    call. No tensor of the size of all weights is made. The frozen products are torch's, in the way that
    :func:`afa_kernels.plan` names: their bits may depend on the groups beside.

    Args:
        x, offsets, lora_a, lora_b, alpha_t, scaling, ranks: as in :func:`afa_lora_grouped`. What rows behind the last
            offset hold is undefined on a GPU, as in ``grouped_mm``, where each group has a weight.
        weight: ``(G, N, K)``, or ``(N, K)`` for all groups, in the dtype of x (any floating dtype under autocast); any
            strides. Or ``(E, N, K)`` with a divisor E of G: each matrix for ``G / E`` groups in a row, such as the
            adapters of an expert. Differentiable.
        bias: ``(G, N)``, with such a weight ``(E, N)``; ``(N,)`` for all groups, or None. Differentiable. Dropout does
            not act on the frozen part.
        activation, dropout_p, dropout_seed, save, backend: as in :func:`afa_kernels.afa_lora`.

    Returns:
        ``(T, N)`` in the dtype of x (of autocast, where it is on).

    Raises:
        TypeError, ValueError, BackendUnavailable: as in :func:`afa_lora_grouped`.
    """
    options, scaling = options_of(activation, scaling, dropout_p, save, backend)
    plain_checks.seed(dropout_seed)
    x, weight = functional.autocast("x", x), functional.autocast("weight", weight)
    checks.operands(x, offsets, lora_a, lora_b, ranks)
    checks.frozen(x, weight, bias, *lora_b.shape[:2])
    groups = groups_of(x, offsets, ranks, alpha_t, scaling)
    return _apply(x, weight, bias, lora_a, lora_b, None, groups, dropout_seed, options, False)


def options_of(activation, scaling, dropout_p, save, backend) -> tuple[Options, Tensor | None]:
    """Return the checked options, and the scaling of each group or None where one number holds for all."""
    of_groups = isinstance(scaling, Tensor)
    options = plain_checks.options(activation, 1.0 if of_groups else scaling, dropout_p, save, backend)
    return options, scaling if of_groups else None


def groups_of(x: Tensor, offsets: Tensor, ranks: Tensor | None, alpha_t, scaling: Tensor | None) -> Groups:
    """Return the checked operands of the groups; alpha_t is None where it is the number 0."""
    count = offsets.shape[0]
    if scaling is not None:
        checks.scaling(scaling, count, x)
    if isinstance(alpha_t, Tensor):
        checks.alpha_tensor(alpha_t, count, x)
    else:
        alpha_t = plain_checks.alpha_value(alpha_t) or None
    if alpha_t is not None:
        alpha_t = functional.on_device(alpha_t, torch.float32, x.device).expand(count)
    return Groups(offsets, ranks, alpha_t, scaling)


def _apply(x, weight, bias, lora_a, lora_b, base, groups: Groups, seed, options, inplace) -> Tensor:
    plain_checks.no_transform("rows sorted by group")
    seed = functional.seed_on_device(seed, x.device) if options.spec.dropout else None
    tensors = (x, weight, bias, lora_a, lora_b, base, *groups, seed)
    direct = not torch_private.operators_are_watched() and torch_private.are_ordinary(tensors)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:6])
    options = _ops.resolved(x, lora_b, options, groups.alpha_t is None, differentiated)
    if differentiated:
        return torch_private.apply(
            AFALoRAGroupedFunction, direct, x, weight, bias, lora_a, lora_b, base, *groups, seed, options, inplace,
            direct,
        )  # fmt: skip
    branch = (x, lora_a, lora_b, *groups, seed, options)
    if weight is not None:
        return ops.linear_forward(direct, weight, bias, *branch)[0]
    if inplace:
        ops.lora_forward_(direct, base, *branch)
        return base
    return ops.lora_forward(direct, base, *branch)[0]
