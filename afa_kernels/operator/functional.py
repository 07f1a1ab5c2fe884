"""The two functions of the package: a LoRA branch with an annealed activation, alone and with its
frozen layer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from afa_kernels import torch_private
from afa_kernels.backend import compiled
from afa_kernels.backend.interface import Rows
from afa_kernels.operator import checks, ops, reference
from afa_kernels.operator.autograd import AFALoRAFunction
from afa_kernels.operator.options import Options
from afa_kernels.operator.quantized_weight import QuantizedWeight, dense


def afa_lora(
    x: Tensor,
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
    offsets: Tensor | None = None,
    ranks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``base + scaling * phi(x @ lora_a.T) @ lora_b.T``: a frozen layer's output with its
    AFA-LoRA update.

    ``phi(z) = (1 - alpha_t) * z + alpha_t * act(z)``. At ``alpha_t == 0`` this is ordinary LoRA,
    runs without an activation and can be merged. Source: Li et al., arXiv 2512.22455.

    Args:
        x: ``(..., K)``, float64, float32, bfloat16 or float16; any strides. Under autocast it is
            rounded to the autocast dtype first.
        lora_a: ``(r, K)`` with any r from 1 on, of any floating dtype. It is rounded to the dtype
            of x, products accumulate in float32 (float64 for float64), and its gradient comes back
            in its own dtype.
        lora_b: ``(N, r)``, likewise.
        alpha_t: float in [0, 1], or a 0-dim float32 tensor that the kernel reads, so that a new
            value neither recompiles nor waits for the device. The float 0.0 leaves the activation
            out; a tensor never does.
        activation: a name from :func:`afa_kernels.activations`.
        scaling: the factor ``s = lora_alpha / r``.
        base: ``(..., N)``, the output of the frozen layer, or None for 0.
        inplace: accumulate into ``base`` and return it; otherwise ``base`` is only read.
        dropout_p: probability of dropping an element of x in the branch, rounded to a multiple of
            1/256 (never to 0); the rest is scaled by ``1 / (1 - p)`` with the rounded p.
        dropout_seed: int or 0-dim int64 tensor that determines the mask; by default drawn from
            torch's generator.
        offsets: ``(G,)`` int32 on the device of x: the rows of ``x (T, K)`` are sorted by owner, each of the G owners
            has its own ``lora_a (G, r, K)`` and ``lora_b (G, N, r)``, and the rows of owner g are ``offsets[g - 1]`` (0
            for the first) to ``offsets[g] - 1``, as in ``torch.nn.functional.grouped_mm``. An owner may have none. Rows
            behind the last offset have no owner: their branch is zero. ``alpha_t`` and ``scaling`` may then be
            ``(G,)`` float32 tensors. Nothing waits for the device to read the offsets, and torch.compile does not
            compile again when they change. The result for an owner's rows and its gradients have the bits of a call
            with that owner alone; where torch multiplies (the backends ``torch`` and ``reference``), as far as the bits
            of its GEMMs do not depend on where their operands lie. The dropout mask is that of the whole x.
        ranks: with ``offsets``, ``(G,)`` int32, the rank of each owner, from 0 (no branch) to r. Rows of ``lora_a[g]``
            and columns of ``lora_b[g]`` beyond it are not read, and their gradient is zero.
        backend: run this backend or raise; by default the first that can take the call
            (:func:`afa_kernels.plan`).

    Returns:
        ``(..., N)`` in the dtype of ``base`` if given, else of x. Without rows the result is empty,
        not an error.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is
            wanted. The values of ``offsets``, ``ranks``, ``alpha_t`` and ``scaling`` are checked where they are on a
            CPU.
        BackendUnavailable: ``backend`` was named and cannot take this call; the message says why.
    """
    checks.seed(dropout_seed)
    if offsets is None:
        options = options_of(activation, scaling, dropout_p, backend, ranks)
        return lora(x, lora_a, lora_b, alpha_of(alpha_t), options, base=base, inplace=inplace, seed=dropout_seed)
    checks.no_transform("rows by owner")
    x = autocast("x", x)
    checks.by_owner(x, lora_a, lora_b, offsets, ranks)
    alpha_t, options, rows = of_owners(x, alpha_t, scaling, activation, dropout_p, backend, offsets, ranks)
    return lora(x, lora_a, lora_b, alpha_t, options, base=base, inplace=inplace, seed=dropout_seed, rows=rows)


def afa_linear(
    x: Tensor,
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
    offsets: Tensor | None = None,
    ranks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias + scaling * phi(x @ lora_a.T) @ lora_b.T``: a linear layer with
    its AFA-LoRA branch.

    The sum is accumulated in place, which saves a pass over the output against ``afa_lora`` with a
    separate base.

    Args:
        x: ``(..., K)``; any strides.
        weight: ``(N, K)`` in the dtype of x (any floating dtype under autocast); any strides.
            Differentiable.
        bias: ``(N,)`` or None. Differentiable. Dropout does not act on the frozen layer.
        offsets, ranks: as in :func:`afa_lora`. The weight of all owners is ``(N, K)``, or ``(G, N, K)`` with one for
            each; or ``(E, N, K)`` with a divisor E of G, each matrix for ``G / E`` owners in a row, such as the
            adapters of an expert. The bias is ``(N,)`` or has one for each matrix. No tensor of the size of all weights
            is made.
            The frozen products are torch's, in the way that :func:`afa_kernels.plan` names, and their bits may depend
            on the owners beside. What rows behind the last offset hold is undefined on a GPU, as in ``grouped_mm``,
            where each owner has a weight.
        lora_a, lora_b, alpha_t, activation, scaling, dropout_p, dropout_seed, backend: as in
            :func:`afa_lora`.

    Returns:
        ``(..., N)`` in the dtype of x (of autocast, where it is on).

    Raises:
        TypeError, ValueError, BackendUnavailable: as in :func:`afa_lora`.
    """
    checks.seed(dropout_seed)
    if offsets is None:
        options = options_of(activation, scaling, dropout_p, backend, ranks)
        return linear(x, weight, bias, lora_a, lora_b, alpha_of(alpha_t), options, seed=dropout_seed)
    checks.no_transform("rows by owner")
    x, weight = autocast("x", x), autocast("weight", weight)
    checks.by_owner(x, lora_a, lora_b, offsets, ranks)
    checks.frozen_by_owner(x, weight, bias, *lora_b.shape[:2])
    alpha_t, options, rows = of_owners(x, alpha_t, scaling, activation, dropout_p, backend, offsets, ranks)
    return linear(x, weight, bias, lora_a, lora_b, alpha_t, options, seed=dropout_seed, rows=rows)


def options_of(activation, scaling, dropout_p, backend, ranks) -> Options:
    """Return the checked options of a call whose rows have one owner."""
    if ranks is not None:
        raise ValueError("ranks: expected with offsets alone, which say whose rows are whose; got offsets=None")
    return checks.options(activation, scaling, dropout_p, backend)


def of_owners(
    x, alpha_t, scaling, activation, dropout_p, backend, offsets, ranks
) -> tuple[Tensor | None, Options, Rows]:
    """Return what the owners of rows bring to a call beside A and B, checked; alpha_t is None where it is the number
    0."""
    count, scalings = offsets.shape[0], None
    if isinstance(scaling, Tensor):
        checks.scaling_of_owners(scaling, count, x)
        scaling, scalings = 1.0, scaling
    options = checks.options(activation, scaling, dropout_p, backend)
    if isinstance(alpha_t, Tensor):
        checks.alpha_of_owners(alpha_t, count, x)
    else:
        alpha_t = checks.alpha_value(alpha_t) or None
    if alpha_t is not None:
        alpha_t = on_device(alpha_t, torch.float32, x.device).expand(count)
    return alpha_t, options, Rows(offsets, ranks, scalings)


class LinearCall(NamedTuple):
    """What a layer computes with: the arguments of :func:`linear` beside x."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    alpha_t: Tensor | None  # None at identity
    options: Options


def lora(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, alpha_t: float | Tensor | None, options: Options,
    *, base: Tensor | None = None, inplace: bool = False, seed: int | Tensor | None = None, rows: Rows | None = None,
) -> Tensor:  # fmt: skip
    """:func:`afa_lora` with options that are checked already, and ``alpha_t`` None at identity: what layers call. With
    ``rows``, x, A, B and alpha_t are checked too."""
    x = autocast("x", x)
    direct = checks.lora(x, lora_a, lora_b, base, inplace=inplace, by_owner=rows is not None)
    n = lora_b.shape[-2]
    if base is None or (base.dtype == x.dtype and not inplace):
        flat_base = None if base is None else as_rows(base)
        y = _apply(x, None, None, lora_a, lora_b, flat_base, alpha_t, seed, options, False, direct, rows)
        return like(y, x, n)
    addressable = direct or not torch_private.in_transform()
    if inplace and base.dtype == x.dtype and addressable and can_accumulate(base, x, lora_a, lora_b):
        return _apply(x, None, None, lora_a, lora_b, base, alpha_t, seed, options, True, direct, rows)
    # The base has another dtype, cannot be viewed as rows or overlaps an operand, or the call is being traced. The
    # branch is then computed alone and added, in one more pass over the base. So it is under a transform of torch.func,
    # whose tensors have no address.
    y = like(_apply(x, None, None, lora_a, lora_b, None, alpha_t, seed, options, False, direct, rows), x, n)
    return base.add_(y) if inplace else base + y.to(base.dtype)


def linear(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor,
    alpha_t: float | Tensor | None, options: Options, *, seed: int | Tensor | None = None, rows: Rows | None = None,
) -> Tensor:  # fmt: skip
    """:func:`afa_linear` with options that are checked already, and ``alpha_t`` None at identity: what layers call.
    With ``rows``, all tensors are checked too."""
    if torch_private.autocast_may_be_on():
        x, weight = autocast("x", x), autocast("weight", weight)
    if rows is None:
        direct = checks.linear(x, weight, bias, lora_a, lora_b)
    else:
        direct = checks.may_be_direct(x, weight, bias, lora_a, lora_b)
    y = _apply(x, weight, bias, lora_a, lora_b, None, alpha_t, seed, options, False, direct, rows)
    return like(y, x, lora_b.shape[-2])


def _apply(x, weight, bias, lora_a, lora_b, base, alpha_t, seed, options, inplace, direct, rows) -> Tensor:
    """Decide what the operands decide, and call the operator, through autograd where something is differentiated."""
    flat = as_rows(x)
    identity = alpha_t is None
    owned = () if rows is None else rows
    if not identity and rows is None:
        alpha_t = on_device(alpha_t, torch.float32, x.device)
    seed = seed_on_device(seed, x.device) if options.spec.dropout else None
    direct = direct and (
        compiled.are_plain(alpha_t, seed, *owned) or torch_private.are_ordinary((alpha_t, seed, *owned))
    )
    differentiated = torch.is_grad_enabled() and (
        lora_a.requires_grad or x.requires_grad or lora_b.requires_grad or _any_requires_grad(weight, bias, base)
    )
    options = ops.resolved(flat, lora_b, options, identity, differentiated)
    if torch_private.in_forward_mode() or (not direct and torch_private.in_transform()):
        return _in_torch_ops(flat, weight, bias, lora_a, lora_b, base, alpha_t, seed, options, inplace)
    if differentiated:
        return torch_private.apply(
            AFALoRAFunction, direct, flat, weight, bias, lora_a, lora_b, base, alpha_t, seed, options, inplace, direct,
            *owned,
        )  # fmt: skip
    branch = (flat, lora_a, lora_b, alpha_t, seed, options, rows)
    if weight is not None:
        return ops.linear_forward(direct, weight if direct else dense(weight, x.dtype), bias, *branch)[0]
    if inplace:
        ops.lora_forward_(direct, base.view(-1, lora_b.shape[-2]), *branch)
        return base
    return ops.lora_forward(direct, base, *branch)[0]


def _in_torch_ops(rows, weight, bias, lora_a, lora_b, base, alpha_t, seed, options, inplace) -> Tensor:
    """Compute the call in plain torch ops, whatever backend was chosen: the transforms of torch.func and forward-mode
    differentiation see through these, and the operators would drop tangents in silence."""
    with ops.plain_precision(rows):
        before = base.view(-1, lora_b.shape[0]) if inplace else base
        if weight is not None:
            before = F.linear(rows, dense(weight, rows.dtype), None if bias is None else bias.to(rows.dtype))
        y, _ = reference.forward(rows, lora_a, lora_b, alpha_t, seed, options.spec, before)
    return base.copy_(y.view(base.shape)) if inplace else y


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def alpha_of(alpha_t: float | Tensor) -> float | Tensor | None:
    """Return a checked alpha_t: None where it is the number 0, which leaves the activation out."""
    if isinstance(alpha_t, Tensor):
        checks.alpha_tensor(alpha_t)
        return alpha_t
    return checks.alpha_value(alpha_t) or None


def as_rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def like(rows: Tensor, x: Tensor, n: int) -> Tensor:
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], n)


def autocast(name: str, t: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    """Round to the autocast dtype where autocast is on; float64 stays, as in torch's own linear. A quantized weight is
    made in the dtype of x."""
    if not torch_private.autocast_may_be_on() or t.__class__ is QuantizedWeight:
        return t
    checks.tensor(name, t)
    device_type = t.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and t.dtype != torch.float64:
        return t.to(torch.get_autocast_dtype(device_type))
    return t


def on_device(scalar: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``scalar`` as a 0-dim tensor of ``dtype`` on ``device``, without waiting for the device.

    The value of a CPU tensor goes to a GPU as the argument of a fill. A copy would have to wait, or, from pinned
    memory, might run after the caller has written the next value; and a captured graph cannot hold a copy from pageable
    memory.
    """
    if isinstance(scalar, Tensor):
        if scalar.device == device:
            return scalar
        if not scalar.is_cpu or is_compiling() or type(scalar) is not Tensor:  # a traced or fake one has no value
            return scalar.to(device)
        scalar = scalar.item()
    return torch.full((), scalar, dtype=dtype, device=device)


def seed_on_device(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        # From the generator of x's device, so that manual_seed, checkpointing and CUDA graphs
        # see it.
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    return on_device(seed, torch.int64, device)


def can_accumulate(base: Tensor, *operands: Tensor) -> bool:
    if is_compiling():
        return False  # the traced form is out of place; functionalization removes the extra pass
    first, last = _extent(base)
    for t in operands:
        t_first, t_last = _extent(t)
        if first < t_last and t_first < last:
            return False
    try:
        base.view(-1, base.shape[-1])
    except RuntimeError:
        return False
    return True


def _extent(t: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor's elements and the byte after its last."""
    if t.numel() == 0:
        return 0, 0
    first = t.data_ptr()
    if t.is_contiguous():
        return first, first + t.nbytes
    span = 1 + sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
    return first, first + span * t.element_size()
