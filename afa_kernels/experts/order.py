"""Rows from the order of tokens to that of experts and back, each with the other as its gradient.

Indexing would add up gradients row by row: with atomics on a GPU, in one thread on a CPU. The order is a permutation,
so that each gradient is a gather too.
"""

import torch
from torch import Tensor


class Order:
    """The order of the pairs of a token and an expert, sorted by expert, those of an expert by adapter.

    Args:
        top_k_index: ``(tokens, k)``, the experts of each token.
        adapters: the number of adapters.
        adapter: ``(tokens,)``, the adapter of each token, where there are several.

    ``group`` is that of each row, ``expert * adapters + adapter``.
    """

    def __init__(self, top_k_index: Tensor, adapters: int = 1, adapter: Tensor | None = None):
        self.top_k, self.adapters = top_k_index.shape[1], adapters
        groups = top_k_index if adapter is None else top_k_index * adapters + adapter[:, None]
        self.group, self.pairs = torch.sort(groups.reshape(-1), stable=True)
        self.places = torch.empty_like(self.pairs)
        self.places[self.pairs] = torch.arange(self.pairs.shape[0], device=self.pairs.device)

    @property
    def expert(self) -> Tensor:
        """The expert of each row."""
        return self.group if self.adapters == 1 else self.group // self.adapters

    def ends(self, experts: int) -> Tensor:
        """Return where the rows of each group end, without waiting for the device."""
        # histc as in transformers: bincount cannot be captured in a CUDA graph. It takes no integers on a CPU, and no
        # floats on a GPU when it has to be deterministic.
        count = experts * self.adapters
        values = self.group.float() if self.group.device.type in ("cpu", "mps") else self.group.int()
        return torch.cumsum(torch.histc(values, bins=count, min=0, max=count - 1), 0, dtype=torch.int32)

    def by_expert(self, tokens: Tensor) -> Tensor:
        """Return the rows of all pairs, ``(tokens * k, n)``, from those of the tokens."""
        return _Spread.apply(tokens, self.pairs, self.places, self.top_k)

    def of_pairs(self, values: Tensor) -> Tensor:
        """Return ``values``, one row for each pair in the order of the tokens, in that of the experts."""
        return _Gather.apply(values, self.pairs, self.places)

    def sum_by_token(self, rows: Tensor) -> Tensor:
        """Return the sum of the k rows of each token."""
        return _Gather.apply(rows, self.places, self.pairs).unflatten(0, (-1, self.top_k)).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, pairs, places, top_k):
        ctx.save_for_backward(pairs, places)
        ctx.top_k = top_k
        return tokens.index_select(0, pairs // top_k)

    @staticmethod
    def backward(ctx, d_rows):
        pairs, places = ctx.saved_tensors
        return _Gather.apply(d_rows, places, pairs).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return _Gather.apply(dy, inverse, order), None, None
