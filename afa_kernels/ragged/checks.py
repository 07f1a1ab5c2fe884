"""The checks of what a caller of the ragged operator passes: each error names the argument, what came and what is
wanted."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from afa_kernels import checks


def operands(x: Tensor, offsets: Tensor, lora_a: Tensor, lora_b: Tensor, ranks: Tensor | None) -> None:
    """Check the operands of the branch: types, dtypes, shapes, devices and, on a CPU, the values of the offsets."""
    checks.tensor("x", x)
    checks.tensor("lora_a", lora_a)
    checks.tensor("lora_b", lora_b)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (rows, in_features), rows sorted by group, got {tuple(x.shape)}")
    k = x.shape[1]
    if lora_a.dim() != 3 or lora_a.shape[2] != k:
        raise ValueError(
            f"lora_a: expected shape (groups, r, {k}) to match x {tuple(x.shape)}, got {tuple(lora_a.shape)}"
        )
    groups, r, _ = lora_a.shape
    if groups < 1 or r < 1:
        raise ValueError(f"lora_a: expected at least one group and a rank of at least 1, got {tuple(lora_a.shape)}")
    if lora_b.dim() != 3 or lora_b.shape[0] != groups or lora_b.shape[2] != r:
        raise ValueError(
            f"lora_b: expected shape ({groups}, out_features, {r}) to match lora_a {tuple(lora_a.shape)}, "
            f"got {tuple(lora_b.shape)}"
        )
    if k == 0 or lora_b.shape[1] == 0:
        raise ValueError(f"x, lora_b: expected at least one feature, got K={k} and N={lora_b.shape[1]}")
    checks.same_device("lora_a", lora_a, x)
    checks.same_device("lora_b", lora_b, x)
    _of_groups("offsets", offsets, torch.int32, groups, x)
    if _has_values(offsets):
        _ends(offsets, x.shape[0])
    if ranks is not None:
        _of_groups("ranks", ranks, torch.int32, groups, x)
        if _has_values(ranks):
            _within("ranks", ranks, 0, r)


def frozen(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, n: int) -> None:
    checks.tensor("weight", weight)
    k = x.shape[1]
    weights = groups
    if weight.dim() == 3 and 0 < weight.shape[0] < groups and groups % weight.shape[0] == 0:
        weights = weight.shape[0]
    if weight.shape not in ((weights, n, k), (n, k)):
        raise ValueError(
            f"weight: expected shape ({groups}, {n}, {k}), a divisor of {groups} in its place, or ({n}, {k}) for all "
            f"groups, to match lora_b and x, got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"weight: expected {checks.dtype_name(x.dtype)}, the dtype of x, got {checks.dtype_name(weight.dtype)}"
        )
    checks.same_device("weight", weight, x)
    if bias is not None:
        checks.tensor("bias", bias)
        if bias.shape not in ((weights, n), (n,)):
            raise ValueError(
                f"bias: expected shape ({weights}, {n}), or ({n},) for all groups, got {tuple(bias.shape)}"
            )
        checks.same_device("bias", bias, x)


def base(value: Tensor | None, x: Tensor, n: int, *, inplace: bool) -> None:
    if value is not None:
        checks.base_tensor(value, x, n)
    if inplace:
        checks.can_be_written(value)


def alpha_tensor(value: Tensor, groups: int, x: Tensor) -> None:
    """Check an alpha_t given as a tensor: 0-dim, or one value for each group."""
    if value.dim() == 0:
        return checks.alpha_tensor(value)
    _of_groups("alpha_t", value, torch.float32, groups, x)
    if value.requires_grad:
        raise ValueError("alpha_t: the operator is not differentiable in alpha_t, got a tensor that requires grad")
    if _has_values(value):
        _within("alpha_t", value, 0.0, 1.0)
    return None


def scaling(value: float | Tensor, groups: int, x: Tensor) -> None:
    """Check a scaling given as a tensor; a number is checked with the options."""
    _of_groups("scaling", value, torch.float32, groups, x)
    if value.requires_grad:
        raise ValueError("scaling: the operator is not differentiable in scaling, got a tensor that requires grad")
    if _has_values(value) and not bool(torch.isfinite(value).all()):
        raise ValueError(f"scaling: expected finite values, got {value.tolist()}")


def _of_groups(name: str, value: object, dtype: torch.dtype, groups: int, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {checks.dtype_name(dtype)}, got {checks.dtype_name(value.dtype)}")
    if value.shape != (groups,):
        raise ValueError(f"{name}: expected shape ({groups},), one value for each group, got {tuple(value.shape)}")
    checks.same_device(name, value, x)


def _has_values(t: Tensor) -> bool:
    """Whether the values can be read without waiting for a device; a traced or fake tensor has none."""
    return t.is_cpu and not is_compiling() and type(t) is Tensor


def _ends(offsets: Tensor, rows: int) -> None:
    before = 0
    for group, end in enumerate(offsets.tolist()):
        if end < before or end > rows:
            raise ValueError(
                f"offsets: expected ends of groups that do not decrease, from 0 to {rows}, the rows of x; "
                f"got {end} for group {group} behind {before}"
            )
        before = end


def _within(name: str, value: Tensor, least: float, most: float) -> None:
    for group, number in enumerate(value.tolist()):
        if not least <= number <= most:  # NaN fails both comparisons
            raise ValueError(f"{name}: expected values from {least} to {most}, got {number} for group {group}")
