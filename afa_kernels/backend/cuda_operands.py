"""How the CUDA kernels read tensors, and copies of those that they cannot read in place."""

import torch
from torch import Tensor

VECTOR = 8  # 16-bit elements in the 16 bytes that the kernels move at a time
_ALIGNMENT = 16


def reads_in_place(t: Tensor) -> bool:
    """Whether the kernels can read a ``(rows, cols)`` matrix where it lies."""
    return t.stride(1) == 1 and t.stride(0) % VECTOR == 0 and t.data_ptr() % _ALIGNMENT == 0


def readable(t: Tensor) -> Tensor:
    return t if reads_in_place(t) else t.clone(memory_format=torch.contiguous_format)


def readable_out(out: Tensor) -> Tensor:
    """Return what the kernels can write in the place of ``out``."""
    return out if reads_in_place(out) else torch.empty_like(out, memory_format=torch.contiguous_format)


def readable_base(base: Tensor | None, out: Tensor, y: Tensor) -> Tensor | None:
    """Return the base of a call that writes ``y`` for ``out``."""
    accumulates = base is out and y is out
    return y if accumulates else None if base is None else readable(base)


def readable_z(z: Tensor) -> Tensor:
    """Return ``z (M, r)`` as the kernels read it: packed, in pairs of elements where r is even. One row of a wider
    matrix is packed wherever it starts."""
    in_pairs = z.shape[1] % 2 == 0
    fits = z.is_contiguous() and not (in_pairs and z.data_ptr() % (2 * z.element_size()))
    return z if fits else z.clone(memory_format=torch.contiguous_format)


def readable_weight(weight: Tensor, x: Tensor) -> Tensor:
    """Return a weight in a dtype that the kernels read and in which they write its gradient."""
    return weight if weight.dtype in (x.dtype, torch.float32) else weight.float()
