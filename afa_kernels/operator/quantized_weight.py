"""A frozen weight that its library keeps quantized: the products of a call see it dequantized, one after the other, and
nothing keeps what they saw."""

from collections.abc import Callable

import torch
from torch import Tensor


class QuantizedWeight:
    """Stands for a weight ``(N, K)`` where a call takes one.

    Args:
        make: returns that weight in floating point. It must keep what it reads as it is now: the backward asks again.
    """

    requires_grad = False

    def __init__(self, shape: tuple[int, int], device: torch.device, make: Callable[[], Tensor]):
        self.shape, self.device, self._make = torch.Size(shape), device, make

    def dim(self) -> int:
        return 2

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in ``dtype``, made for this call."""
        with torch.no_grad():
            return self._make().detach().to(dtype)


def dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return what a product in ``dtype`` multiplies with."""
    return weight.dense(dtype) if weight.__class__ is QuantizedWeight else weight


def any_quantized(weights: list) -> bool:
    return any([weight.__class__ is QuantizedWeight for weight in weights])


def apart(weights: list) -> tuple[list[Tensor | None], list[QuantizedWeight | None]]:
    """Return what autograd may save of weights, and what it may not."""
    quantized = [w if w.__class__ is QuantizedWeight else None for w in weights]
    return [w if q is None else None for w, q in zip(weights, quantized, strict=True)], quantized


def together(saved: list[Tensor | None], quantized: list[QuantizedWeight | None]) -> list[Tensor | QuantizedWeight]:
    """Undo :func:`apart`."""
    return [w if q is None else q for w, q in zip(saved, quantized, strict=True)]
