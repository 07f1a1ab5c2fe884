"""LoRA dropout without a stored mask: every backend regenerates the same bits from a seed.

The mask of an ``(M, K)`` input is Philox4x32-10 keyed by the 64-bit seed. Counter ``row * ceil(K /
16) + col // 16`` yields 16 bytes, one for each of 16 neighbouring columns (little endian); an
element is kept where its byte is at least ``threshold``, so the dropout probability is a multiple
of 1/256.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

COLUMNS_PER_CALL = 16
LEVELS = 256

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW32 = 0xFFFFFFFF


def threshold_of(p: float) -> int:
    """Return the byte threshold for probability ``p``: ``p`` rounded to 1/256, but never to 0 or 1
    unless it is 0."""
    if p == 0.0:
        return 0
    return min(max(round(p * LEVELS), 1), LEVELS - 1)


def inverse_keep(threshold: int) -> float:
    """Return the factor ``1 / (1 - p)`` of inverted dropout for the rounded ``p = threshold /
    256``."""
    return LEVELS / (LEVELS - threshold)


def keep_mask(seed: Tensor, rows: int, cols: int, threshold: int, first_row: int = 0) -> Tensor:
    """Return the boolean ``(rows, cols)`` mask, True where an element is kept: rows ``first_row`` and on of the mask of
    a larger input.

    Args:
        seed: 0-dim int64 tensor; its device is the device of the mask.
        threshold: dropped values out of 256, from :func:`threshold_of`.
    """
    calls = -(-cols // COLUMNS_PER_CALL)
    first = first_row * calls
    counter = torch.arange(first, first + rows * calls, dtype=torch.int64, device=seed.device)
    # Each int64 holds a 32-bit word. The product of two words may overflow into the sign bit, which does no harm: its
    # low and high 32 bits are extracted with & and >>, and they are those of the unsigned product.
    c = [counter & _LOW32, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & _LOW32, (seed >> 32) & _LOW32]
    for _ in range(_ROUNDS):
        product0, product1 = c[0] * _MULTIPLIER[0], c[2] * _MULTIPLIER[1]
        c = [
            ((product1 >> 32) & _LOW32) ^ c[1] ^ key[0],
            product1 & _LOW32,
            ((product0 >> 32) & _LOW32) ^ c[3] ^ key[1],
            product0 & _LOW32,
        ]
        key = [(key[0] + _WEYL[0]) & _LOW32, (key[1] + _WEYL[1]) & _LOW32]
    words = torch.stack(c, dim=-1)  # (calls, 4)
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int64, device=seed.device)
    levels = (words.unsqueeze(-1) >> shifts) & 0xFF  # (calls, 4, 4)
    return (levels >= threshold).view(rows, calls * COLUMNS_PER_CALL)[:, :cols]


def drop(t: Tensor, seed: Tensor | None, threshold: int, first_row: int = 0) -> Tensor:
    """Return ``t (rows, cols)`` with the dropped elements zero; the factor :func:`inverse_keep` is the caller's."""
    return t * keep_mask(seed, *t.shape, threshold, first_row) if threshold else t
