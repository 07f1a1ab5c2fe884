"""Every check of what a caller passes, once: each error names the argument, what came and what is wanted.

Operands that pass cost more to check in Python than a small call's kernels take on a CPU. csrc/python/checks.cpp
recognizes the common ones, on the CPU and on CUDA devices; what it does not recognize is checked here, and only here
are errors made.
"""

import math
from numbers import Real

import torch
from torch import Tensor
from torch.compiler import is_compiling

from afa_kernels import torch_private
from afa_kernels.backend import compiled
from afa_kernels.backend.choice import check_name, remembered
from afa_kernels.operator.activation import ACTIVATIONS
from afa_kernels.operator.dropout import threshold_of
from afa_kernels.operator.options import Options, Spec, at_identity
from afa_kernels.operator.quantized_weight import QuantizedWeight

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FLOATING_NAMES = "float64, float32, bfloat16 or float16"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(t: Tensor) -> str:
    return dtype_name(t.dtype)


def _is_number(value: object) -> bool:
    # The type is compared first, because isinstance with an abstract class is several times as slow.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected {_FLOATING_NAMES}, got {_dtype(value)}")
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {got}")


def lora(x: Tensor, lora_a: Tensor, lora_b: Tensor, base: Tensor | None, *, inplace: bool, by_owner: bool = False
) -> bool:  # fmt: skip
    """Check the operands of :func:`afa_kernels.afa_lora`, of rows by owner the base alone; return whether they may skip
    torch's dispatcher."""
    watched = torch_private.operators_are_watched()
    recognized = not (watched or by_owner) and compiled.recognizes_lora(x, lora_a, lora_b, base)
    if not recognized:
        if not by_owner:
            branch(x, lora_a, lora_b)
        if base is not None:
            base_tensor(base, x, lora_b.shape[-2])
    if inplace:
        can_be_written(base)
    return recognized or (not watched and torch_private.are_ordinary((x, lora_a, lora_b, base)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Check the operands of :func:`afa_kernels.afa_linear`; return whether they may skip torch's dispatcher."""
    watched = torch_private.operators_are_watched()
    if not watched and compiled.recognizes_linear(x, weight, bias, lora_a, lora_b):
        return True
    branch(x, lora_a, lora_b)
    quantized = weight.__class__ is QuantizedWeight
    _frozen(x, weight, bias, lora_b.shape[0], quantized)
    return not watched and torch_private.are_ordinary((x, None if quantized else weight, bias, lora_a, lora_b))


def may_be_direct(*operands: Tensor | None) -> bool:
    """Return whether checked operands may skip torch's dispatcher."""
    return not torch_private.operators_are_watched() and torch_private.are_ordinary(operands)


def shared_input(x: Tensor, layers: list[tuple[Tensor, Tensor | None, Tensor, Tensor]]) -> bool:
    """:func:`linear` of x and each of the layers (weight, bias, A, B)."""
    if not torch_private.operators_are_watched() and compiled.recognizes_shared(x, layers):
        return True
    return all([linear(x, *layer) for layer in layers])  # a list, so that every layer is checked


def branch(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    """Check the operands of the branch: types, dtypes, shapes and devices."""
    input_tensor(x)
    tensor("lora_a", lora_a)
    tensor("lora_b", lora_b)
    k = x.shape[-1]
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a: expected shape (r, {k}) to match x {tuple(x.shape)}, got {tuple(lora_a.shape)}")
    r = lora_a.shape[0]
    if r < 1:
        raise ValueError(f"lora_a: expected a rank of at least 1, got shape {tuple(lora_a.shape)}")
    if lora_b.dim() != 2 or lora_b.shape[1] != r:
        raise ValueError(
            f"lora_b: expected shape (out_features, {r}) to match lora_a {tuple(lora_a.shape)}, "
            f"got {tuple(lora_b.shape)}"
        )
    if k == 0 or lora_b.shape[0] == 0:
        raise ValueError(f"x, lora_b: expected at least one feature, got K={k} and N={lora_b.shape[0]}")
    same_device("lora_a", lora_a, x)
    same_device("lora_b", lora_b, x)


def no_transform(what: str) -> None:
    """Raise under what sees through torch's own operators only."""
    if torch_private.in_transform():
        raise NotImplementedError(
            f"{what}: not possible inside a transform of torch.func (grad, vmap, jvp, ...) or forward-mode "
            "differentiation; use torch.autograd.grad, or afa_lora for the rows of each owner"
        )


def input_tensor(x: Tensor) -> None:
    tensor("x", x)
    if not x.shape:
        raise ValueError("x: expected shape (..., in_features), got a 0-dim tensor")


def same_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name}: expected on {x.device}, the device of x, got {value.device}")


def base_tensor(value: Tensor, x: Tensor, n: int) -> None:
    tensor("base", value)
    wanted = (*x.shape[:-1], n)
    if value.shape != wanted:
        raise ValueError(f"base: expected shape {wanted}, got {tuple(value.shape)}")
    same_device("base", value, x)


def can_be_written(base: Tensor | None) -> None:
    if base is None:
        raise ValueError("inplace: expected a base to accumulate into, got base=None")
    if base.requires_grad and base.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "base: a leaf that requires grad cannot be accumulated into; "
            "pass inplace=False, or a result of an operation"
        )
    if _overlaps_itself(base):
        raise ValueError(
            "base: an expanded view cannot be accumulated into "
            f"(shape {tuple(base.shape)}, strides "
            f"{base.stride()}); pass inplace=False, or base.contiguous()"
        )


def _overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may share memory: conservative, exact for expanded and for ordinary
    strided views."""
    if t.is_contiguous():
        return False
    reach = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, quantized: bool) -> None:
    if not quantized:
        tensor("weight", weight)
    k = x.shape[-1]
    if weight.shape != (n, k):
        raise ValueError(f"weight: expected shape ({n}, {k}) to match lora_b and x, got {tuple(weight.shape)}")
    if not quantized and weight.dtype != x.dtype:
        raise TypeError(f"weight: expected {_dtype(x)}, the dtype of x, got {_dtype(weight)}")
    if bias is not None:
        tensor("bias", bias)
        if bias.shape != (n,):
            raise ValueError(f"bias: expected shape ({n},), got {tuple(bias.shape)}")
        same_device("bias", bias, x)
    same_device("weight", weight, x)


def alpha_value(value: object, name: str = "alpha_t") -> float:
    """Return a blend coefficient given as a number, checked."""
    if not _is_number(value):
        raise TypeError(f"{name}: expected a float in [0, 1] or a 0-dim float32 tensor, got {type(value).__name__}")
    value = float(value)
    if not 0.0 <= value <= 1.0:  # NaN fails both comparisons
        raise ValueError(f"{name}: expected a value in [0, 1], got {value}")
    return value


def alpha_tensor(value: Tensor) -> None:
    if value.dtype != torch.float32 or value.dim() != 0:
        raise TypeError(
            f"alpha_t: expected a float in [0, 1] or a 0-dim float32 tensor, "
            f"got a {value.dim()}-dim {_dtype(value)} tensor"
        )
    if value.requires_grad:
        raise ValueError("alpha_t: the operator is not differentiable in alpha_t, got a tensor that requires grad")
    # Reading a tensor of another device would wait for that device, and a traced one has no value.
    if value.is_cpu and not is_compiling() and type(value) is Tensor:
        try:
            number = compiled.value_of(value)
        except RuntimeError:
            if torch_private.in_transform():  # vmap over alpha_t: there is not one value
                return
            raise
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"alpha_t: expected a value in [0, 1], got {number}")


def options(activation: str, scaling: float, dropout_p: float, backend: str | None) -> Options:
    """Return the options of a call, checked; the same ones again cost a look into a table."""
    if not is_compiling():  # torch.compile ignores lru_cache, with a warning
        try:
            return _known_options(activation, scaling, dropout_p, backend)
        except TypeError:  # an argument is of a wrong type or cannot be hashed: checked below
            pass
    return _checked_options(activation, scaling, dropout_p, backend)


def options_of_lora(scaling: float, dropout_p: float) -> Options:
    """Return the options of a plain LoRA, which has no activation, checked."""
    return at_identity(options(next(iter(ACTIVATIONS)), scaling, dropout_p, None))


def _checked_options(activation, scaling, dropout_p, backend) -> Options:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not _is_number(scaling):
        raise TypeError(f"scaling: expected a float, got {type(scaling).__name__}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling: expected a finite value, got {scaling}")
    if not _is_number(dropout_p):
        raise TypeError(f"dropout_p: expected a float in [0, 1), got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    check_name(backend)
    return Options(Spec(activation, float(scaling), threshold_of(dropout_p)), True, backend)


# typed, because 1 == True, but True is refused as a number.
_known_options = remembered(_checked_options, typed=True)


def seed(value: object) -> None:
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim() != 0:
            raise TypeError(
                f"dropout_seed: expected an int or a 0-dim int64 tensor, got a {value.dim()}-dim {_dtype(value)} tensor"
            )
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"dropout_seed: expected an int or a 0-dim int64 tensor, got {type(value).__name__}")
    elif not -(2**63) <= value < 2**63:
        raise ValueError(f"dropout_seed: expected a 64-bit signed integer, got {value}")


# --- rows by owner


def by_owner(x: Tensor, lora_a: Tensor, lora_b: Tensor, offsets: Tensor, ranks: Tensor | None) -> None:
    """Check the operands of the branches of all owners: types, dtypes, shapes, devices and, on a CPU, the values of the
    offsets and ranks."""
    tensor("x", x)
    tensor("lora_a", lora_a)
    tensor("lora_b", lora_b)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (rows, in_features), rows sorted by owner, got {tuple(x.shape)}")
    k = x.shape[1]
    if lora_a.dim() != 3 or lora_a.shape[2] != k:
        raise ValueError(
            f"lora_a: expected shape (owners, r, {k}) to match x {tuple(x.shape)}, got {tuple(lora_a.shape)}"
        )
    owners, r, _ = lora_a.shape
    if owners < 1 or r < 1:
        raise ValueError(f"lora_a: expected at least one owner and a rank of at least 1, got {tuple(lora_a.shape)}")
    if lora_b.dim() != 3 or lora_b.shape[0] != owners or lora_b.shape[2] != r:
        raise ValueError(
            f"lora_b: expected shape ({owners}, out_features, {r}) to match lora_a {tuple(lora_a.shape)}, "
            f"got {tuple(lora_b.shape)}"
        )
    if k == 0 or lora_b.shape[1] == 0:
        raise ValueError(f"x, lora_b: expected at least one feature, got K={k} and N={lora_b.shape[1]}")
    same_device("lora_a", lora_a, x)
    same_device("lora_b", lora_b, x)
    _of_owners("offsets", offsets, torch.int32, owners, x)
    if _has_values(offsets):
        _ends(offsets, x.shape[0])
    if ranks is not None:
        _of_owners("ranks", ranks, torch.int32, owners, x)
        if _has_values(ranks):
            _within("ranks", ranks, 0, r)


def frozen_by_owner(x: Tensor, weight: Tensor, bias: Tensor | None, owners: int, n: int) -> None:
    tensor("weight", weight)
    k = x.shape[1]
    weights = owners
    if weight.dim() == 3 and 0 < weight.shape[0] < owners and owners % weight.shape[0] == 0:
        weights = weight.shape[0]
    if weight.shape not in ((weights, n, k), (n, k)):
        raise ValueError(
            f"weight: expected shape ({owners}, {n}, {k}), a divisor of {owners} in its place, or ({n}, {k}) for all "
            f"owners, to match lora_b and x, got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected {_dtype(x)}, the dtype of x, got {_dtype(weight)}")
    same_device("weight", weight, x)
    if bias is not None:
        tensor("bias", bias)
        if bias.shape not in ((weights, n), (n,)):
            raise ValueError(
                f"bias: expected shape ({weights}, {n}), or ({n},) for all owners, got {tuple(bias.shape)}"
            )
        same_device("bias", bias, x)


def alpha_of_owners(value: Tensor, owners: int, x: Tensor) -> None:
    """Check an alpha_t given as a tensor: 0-dim, or one value for each owner."""
    if value.dim() == 0:
        alpha_tensor(value)
        return
    _of_owners("alpha_t", value, torch.float32, owners, x)
    if value.requires_grad:
        raise ValueError("alpha_t: the operator is not differentiable in alpha_t, got a tensor that requires grad")
    if _has_values(value):
        _within("alpha_t", value, 0.0, 1.0)


def scaling_of_owners(value: Tensor, owners: int, x: Tensor) -> None:
    """Check a scaling given as a tensor; a number is checked with the options."""
    _of_owners("scaling", value, torch.float32, owners, x)
    if value.requires_grad:
        raise ValueError("scaling: the operator is not differentiable in scaling, got a tensor that requires grad")
    if _has_values(value) and not bool(torch.isfinite(value).all()):
        raise ValueError(f"scaling: expected finite values, got {value.tolist()}")


def _of_owners(name: str, value: object, dtype: torch.dtype, owners: int, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype_name(dtype)}, got {_dtype(value)}")
    if value.shape != (owners,):
        raise ValueError(f"{name}: expected shape ({owners},), one value for each owner, got {tuple(value.shape)}")
    same_device(name, value, x)


def _has_values(t: Tensor) -> bool:
    """Whether the values can be read without waiting for a device; a traced or fake tensor has none."""
    return t.is_cpu and not is_compiling() and type(t) is Tensor


def _ends(offsets: Tensor, rows: int) -> None:
    before = 0
    for owner, end in enumerate(offsets.tolist()):
        if end < before or end > rows:
            raise ValueError(
                f"offsets: expected ends of owners' rows that do not decrease, from 0 to {rows}, the rows of x; "
                f"got {end} for owner {owner} behind {before}"
            )
        before = end


def _within(name: str, value: Tensor, least: float, most: float) -> None:
    for owner, number in enumerate(value.tolist()):
        if not least <= number <= most:  # NaN fails both comparisons
            raise ValueError(f"{name}: expected values from {least} to {most}, got {number} for owner {owner}")
