"""The mask against an independent Philox, and the statistics that make it a dropout mask."""

import numpy as np
import pytest
import torch

import afa_kernels as afa
from afa_kernels.operator import dropout

pytestmark = pytest.mark.fast


def philox_numpy(seed: int, counter: int) -> np.ndarray:
    """Philox4x32-10 straight from the paper, in Python integers: 16 bytes."""
    c = [counter & 0xFFFFFFFF, counter >> 32 & 0xFFFFFFFF, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.array(c, dtype="<u4").view(np.uint8)


def test_philox_known_answer():
    """Counter and key 0, from the known-answer file of the authors' Random123."""
    assert philox_numpy(0, 0).view("<u4").tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_mask_is_philox(seed):
    rows, cols, threshold = 5, 37, 77
    want = np.stack(
        [
            np.concatenate([philox_numpy(seed % 2**64, row * 3 + group) for group in range(3)])[:cols] >= threshold
            for row in range(rows)
        ]
    )
    got = dropout.keep_mask(torch.tensor(seed, dtype=torch.int64), rows, cols, threshold)
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("p,threshold", [(0.0, 0), (1e-9, 1), (0.1, 26), (0.5, 128), (0.999999, 255)])
def test_probability_is_rounded_but_never_to_0_or_1(p, threshold):
    assert dropout.threshold_of(p) == threshold


def test_mask_keeps_the_expected_share():
    mask = dropout.keep_mask(torch.tensor(3), 400, 1000, dropout.threshold_of(0.1))
    share, expected = mask.double().mean().item(), 1 - 26 / 256
    assert abs(share - expected) < 4 * (expected * (1 - expected) / mask.numel()) ** 0.5


def test_seed_comes_from_the_generator_of_torch():
    x, a, b = torch.randn(9, 32), torch.randn(4, 32), torch.randn(8, 4)
    torch.manual_seed(5)
    first, second = (afa.afa_lora(x, a, b, 0.5, dropout_p=0.5) for _ in "ab")
    torch.manual_seed(5)
    assert torch.equal(first, afa.afa_lora(x, a, b, 0.5, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_int_and_tensor_seed_agree():
    x, a, b = torch.randn(9, 32), torch.randn(4, 32), torch.randn(8, 4)
    with_int = afa.afa_lora(x, a, b, 0.5, dropout_p=0.5, dropout_seed=-3)
    assert torch.equal(with_int, afa.afa_lora(x, a, b, 0.5, dropout_p=0.5, dropout_seed=torch.tensor(-3)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_mask(use_reentrant):
    x = torch.randn(9, 32, requires_grad=True)
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(8, 4, requires_grad=True)

    def branch(x):
        return afa.afa_lora(x, a, b, 0.5, dropout_p=0.5)

    torch.manual_seed(7)
    want = torch.autograd.grad(branch(x).square().sum(), (x, a, b))
    torch.manual_seed(7)
    y = torch.utils.checkpoint.checkpoint(branch, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for leaf, gradient in zip((x, a, b), want, strict=True):
        assert torch.equal(leaf.grad, gradient)
