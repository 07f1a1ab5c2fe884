"""Ways for a matrix to lie in memory, with NaN around it."""

import torch
from helpers import packed
from torch import Tensor

# How a matrix, or those of all owners, may lie in memory: the shape of the memory, and which of it they are.
LAYOUTS = {
    "packed": lambda n, rows, cols: ((*n, rows, cols), lambda t: t),
    "rows apart": lambda n, rows, cols: ((*n, rows, cols + 24), lambda t: t[..., :cols]),
    "rows at odd places": lambda n, rows, cols: ((*n, rows, cols + 3), lambda t: t[..., 3:]),
    "columns apart": lambda n, rows, cols: ((*n, cols, rows + 5), lambda t: t[..., :rows].mT),
    "every other row": lambda n, rows, cols: ((*n, 2 * rows, cols), lambda t: t[..., ::2, :]),
    "every third element": lambda n, rows, cols: ((*n, rows, 3 * cols), lambda t: t[..., ::3]),
}
OF_OWNERS = LAYOUTS | {
    "owners fastest": lambda n, rows, cols: ((rows, cols, *n), lambda t: t.permute(2, 0, 1)),
    "every other owner": lambda n, rows, cols: ((2 * n[0], rows, cols), lambda t: t[::2]),
}


def placed(t: Tensor, layout: str) -> Tensor:
    """Return ``t`` in memory of its own that holds NaN around it."""
    *owners, rows, cols = t.shape
    shape, of_memory = OF_OWNERS[layout](owners, rows, cols)
    return of_memory(torch.full(shape, torch.nan, dtype=t.dtype, device=t.device)).copy_(t)


def memory_of(t: Tensor) -> Tensor:
    return t if t._base is None else t._base


def bits(t: Tensor) -> Tensor:
    return packed(t).reshape(-1).view(torch.uint8)


def around(t: Tensor) -> Tensor:
    """Return the bits of the memory around a tensor."""
    memory = memory_of(t).clone()
    memory.as_strided(t.shape, t.stride(), t.storage_offset()).zero_()
    return bits(memory)
