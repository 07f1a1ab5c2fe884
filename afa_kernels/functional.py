"""The two functions of the package: a LoRA branch with an annealed activation, alone and with its
frozen layer."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afa_kernels import _ops, checks, dropout
from afa_kernels.autograd import AFALoRAFunction
from afa_kernels.backend.registry import IDENTITY


def afa_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha_t: float | Tensor,
    *,
    activation: str = "silu",
    scaling: float = 1.0,
    base: Tensor | None = None,
    inplace: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    save: str = "z",
    backend: str | None = None,
) -> Tensor:
    """Return ``base + scaling * phi(x @ lora_a.T) @ lora_b.T``: a frozen layer's output with its
    AFA-LoRA update.

    ``phi(z) = (1 - alpha_t) * z + alpha_t * act(z)``. At ``alpha_t == 0`` this is ordinary LoRA,
    runs as plain GEMMs and can be merged. Source: Li et al., arXiv 2512.22455.

    Args:
        x: ``(..., K)``, float64, float32, bfloat16 or float16; any strides. Under autocast it is
            rounded to the autocast dtype first.
        lora_a: ``(r, K)`` with r from 1 to 256, of any floating dtype. It is rounded to the dtype
            of x, products accumulate in float32 (float64 for float64), and its gradient comes back
            in its own dtype.
        lora_b: ``(N, r)``, likewise.
        alpha_t: float in [0, 1], or a 0-dim float32 tensor that the kernel reads, so that a new
            value neither recompiles nor waits for the device. The float 0.0 takes the GEMM path; a
            tensor never does.
        activation: a name from :func:`afa_kernels.activations`.
        scaling: the factor ``s = lora_alpha / r``.
        base: ``(..., N)``, the output of the frozen layer, or None for 0.
        inplace: accumulate into ``base`` and return it; otherwise ``base`` is only read.
        dropout_p: probability of dropping an element of x in the branch, rounded to a multiple of
            1/256 (never to 0); the rest is scaled by ``1 / (1 - p)`` with the rounded p.
        dropout_seed: int or 0-dim int64 tensor that determines the mask; by default drawn from
            torch's generator.
        save: ``"z"`` saves ``z = x @ lora_a.T`` for the backward, ``"nothing"`` recomputes it.
        backend: run this backend or raise; by default the first that can take the call
            (:func:`afa_kernels.plan`).

    Returns:
        ``(..., N)`` in the dtype of ``base`` if given, else of x. Without rows the result is empty,
        not an error.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what is
            wanted.
        BackendUnavailable: ``backend`` was named and cannot take this call; the message says why.
    """
    checks.branch(x, lora_a, lora_b)
    checks.options(activation, scaling, dropout_p, save, backend)
    n = lora_b.shape[0]
    if base is not None:
        checks.base(base, x, n, inplace=inplace)
    elif inplace:
        raise ValueError("inplace: expected a base to accumulate into, got base=None")
    x = autocast(x)
    options = _options(x, alpha_t, activation, scaling, dropout_p, dropout_seed, save)
    rows = _as_rows(x)
    if base is None or (base.dtype == x.dtype and not inplace):
        flat_base = None if base is None else _as_rows(base)
        return _like(_apply(rows, None, None, lora_a, lora_b, flat_base, options, backend), x, n)
    if inplace and base.dtype == x.dtype and _can_accumulate(base, x, lora_a, lora_b):
        return _apply(rows, None, None, lora_a, lora_b, base, options, backend, inplace=True)
    # The base has another dtype, cannot be viewed as rows, overlaps an operand, or is being
    # traced: one more pass over it.
    y = _like(_apply(rows, None, None, lora_a, lora_b, None, options, backend), x, n)
    return base.add_(y) if inplace else base + y.to(base.dtype)


def afa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha_t: float | Tensor,
    *,
    activation: str = "silu",
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    save: str = "z",
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
        lora_a, lora_b, alpha_t, activation, scaling, dropout_p, dropout_seed, save, backend: as in
            :func:`afa_lora`.

    Returns:
        ``(..., N)`` in the dtype of x (of autocast, where it is on).

    Raises:
        TypeError, ValueError, BackendUnavailable: as in :func:`afa_lora`.
    """
    checks.branch(x, lora_a, lora_b)
    checks.options(activation, scaling, dropout_p, save, backend)
    checks.tensor("weight", weight)
    x, weight = autocast(x), autocast(weight)
    n = lora_b.shape[0]
    checks.linear(x, weight, bias, n)
    options = _options(x, alpha_t, activation, scaling, dropout_p, dropout_seed, save)
    return _like(_apply(_as_rows(x), weight, bias, lora_a, lora_b, None, options, backend), x, n)


def _apply(x, weight, bias, lora_a, lora_b, base, options, backend, inplace=False) -> Tensor:
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, lora_a, lora_b, base)
    )
    # Under forward-mode differentiation the Function refuses; the operators alone would drop the
    # tangents in silence.
    if differentiated or forward_ad._current_level >= 0:
        return AFALoRAFunction.apply(x, weight, bias, lora_a, lora_b, base, *options, inplace, backend)
    branch = (x, lora_a, lora_b, *options[:-1], False, backend)
    if weight is not None:
        return _ops.linear_forward(weight, bias, *branch)[0]
    if inplace:
        _ops.lora_forward_(base.view(-1, lora_b.shape[0]), *branch)
        return base
    return _ops.lora_forward(base, *branch)[0]


def _as_rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _like(rows: Tensor, x: Tensor, n: int) -> Tensor:
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], n)


def _options(x, alpha_t, activation, scaling, dropout_p, dropout_seed, save) -> tuple:
    """Return alpha_t, seed, activation, scaling, dropout threshold and save_z for the operators."""
    alpha_t, activation = _alpha(alpha_t, activation, x)
    if dropout_seed is not None:
        checks.seed(dropout_seed)
    seed, threshold = (None, 0) if dropout_p == 0.0 else _dropout(dropout_p, dropout_seed, x)
    save_z = save == "z" and activation != IDENTITY
    return alpha_t, seed, activation, float(scaling), threshold, save_z


def autocast(t: Tensor) -> Tensor:
    """Round to the autocast dtype where autocast is on; float64 stays, as in torch's own linear."""
    if not torch._C._is_any_autocast_enabled():
        return t
    device_type = t.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and t.dtype != torch.float64:
        return t.to(torch.get_autocast_dtype(device_type))
    return t


def _alpha(alpha_t: float | Tensor, activation: str, x: Tensor) -> tuple[Tensor, str]:
    """Return alpha_t as a tensor on the device of x, and the activation: identity where alpha_t is
    the number 0."""
    if isinstance(alpha_t, Tensor):
        checks.alpha_tensor(alpha_t)
        if alpha_t.device != x.device:
            alpha_t = alpha_t.to(x.device, non_blocking=True)
        return alpha_t, activation
    value = checks.alpha_value(alpha_t)
    return torch.full((), value, dtype=torch.float32, device=x.device), IDENTITY if value == 0.0 else activation


def _dropout(p: float, seed: int | Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    if seed is None:
        # From the generator of x's device, so that manual_seed, checkpointing and CUDA graphs
        # see it.
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
    elif isinstance(seed, Tensor):
        seed = seed.to(x.device, non_blocking=True)
    else:
        seed = torch.full((), seed, dtype=torch.int64, device=x.device)
    return seed, dropout.threshold_of(p)


def _can_accumulate(base: Tensor, *operands: Tensor) -> bool:
    if torch.compiler.is_compiling():
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
