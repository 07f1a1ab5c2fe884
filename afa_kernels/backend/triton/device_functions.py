"""Device functions that the kernels share: the activation, the dropout mask, and the streamed product."""

import triton
import triton.language as tl

# In the interpreter a constexpr times a tensor is no tensor: the tensor goes first.
_COLUMNS_PER_CALL = tl.constexpr(16)  # afa_kernels.dropout.COLUMNS_PER_CALL
_SQRT_HALF = tl.constexpr(0.70710678118654752440)
_SQRT_2_OVER_PI = tl.constexpr(0.79788456080286535588)
_INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
_GELU_TANH_CUBIC = tl.constexpr(0.044715)
_LEAKY_SLOPE = tl.constexpr(0.01)


@triton.jit
def _tanh(z):
    # Near 0 the exponential form cancels, so there a Pade approximant, whose error at 0.6 is below
    # 1e-9.
    square = z * z
    near = z * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    magnitude = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(z)) + 1.0)
    return tl.where(tl.abs(z) < 0.6, near, tl.where(z < 0, -magnitude, magnitude))


@triton.jit
def _value_and_slope(z, ACT: tl.constexpr):
    """Return act(z) and act'(z). A kernel that needs one of them pays for that one: the compiler drops the other."""
    if ACT == "relu":
        return tl.where(z > 0, z, 0.0), tl.where(z > 0, 1.0, 0.0)
    elif ACT == "silu":
        sigmoid = tl.sigmoid(z)
        return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        return z * cdf, cdf + z * _INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        t = _tanh((z + z * z * z * _GELU_TANH_CUBIC) * _SQRT_2_OVER_PI)
        inner = (1.0 + 3.0 * (z * z * _GELU_TANH_CUBIC)) * _SQRT_2_OVER_PI
        return 0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    elif ACT == "leaky_relu":
        return tl.where(z > 0, z, z * _LEAKY_SLOPE), tl.where(z > 0, 1.0, _LEAKY_SLOPE)
    elif ACT == "tanh":
        t = _tanh(z)
        return t, 1.0 - t * t
    else:
        tl.static_assert(ACT == "sin")
        return tl.sin(z), tl.cos(z)


@triton.jit
def load_alpha(alpha_ptr, ACT: tl.constexpr):
    """Return alpha_t; at identity there is none, and 0.0 stands for it."""
    if ACT == "identity":
        return 0.0
    else:
        return tl.load(alpha_ptr)


@triton.jit
def phi(z, alpha_t, ACT: tl.constexpr):
    if ACT == "identity":
        return z
    else:
        value, _ = _value_and_slope(z, ACT)
        return (1.0 - alpha_t) * z + alpha_t * value


@triton.jit
def phi_slope(z, alpha_t, ACT: tl.constexpr):
    if ACT == "identity":
        return 1.0
    else:
        _, slope = _value_and_slope(z, ACT)
        return (1.0 - alpha_t) + alpha_t * slope


@triton.jit
def keep_mask(
    seed, threshold, first_row, first_col, calls_per_row, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr
):  # fmt: skip
    """Return the (BLOCK_M, BLOCK_K) dropout mask of afa_kernels/operator/dropout.py; ``first_col`` is a
    multiple of 16."""
    GROUPS: tl.constexpr = BLOCK_K // _COLUMNS_PER_CALL
    rows = first_row + tl.arange(0, BLOCK_M)  # int64: the counter has 64 bits
    groups = first_col // _COLUMNS_PER_CALL + tl.arange(0, GROUPS)
    counter = rows[:, None] * calls_per_row + groups[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    word0, word1, word2, word3 = tl.philox(seed, low, high, zero, zero)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # (BLOCK_M, GROUPS, 2, 2), in order
    words = tl.reshape(words, (BLOCK_M, GROUPS * 4))
    shifts = (8 * tl.arange(0, 4)).to(tl.uint32)
    levels = (words[:, :, None] >> shifts[None, None, :]) & 0xFF
    return tl.reshape(levels.to(tl.int32) >= threshold, (BLOCK_M, BLOCK_K))


@triton.jit
def load_z(z_ptr, first_row, rows_left, r, BLOCK_M: tl.constexpr, R: tl.constexpr):
    """Return a float32 (BLOCK_M, R) tile of the contiguous ``z (M, r)``, 0 outside: phi(0) = 0 adds
    nothing."""
    row, rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    mask = (row < rows_left)[:, None] & (rank < r)[None, :]
    return tl.load(z_ptr + first_row * r + row[:, None] * r + rank[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def multiple(value, STEP: tl.constexpr):
    """Return ``value``, a multiple of STEP, as one that the compiler knows to be so."""
    return value // STEP * STEP


@triton.jit
def load_small(
    small_ptr, rank, col, r, length, stride_rank, stride_col, dtype: tl.constexpr,
    R: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """Return a tile of a, or of b transposed, rounded to ``dtype``, with zeros beyond rank ``r`` and column ``length``.

    ``rank`` and ``col`` are the indices, one as a column and the other as a row. RANK_STEP divides r: then a load of so
    many ranks has one mask, and at R it has none.
    """
    mask = col < length
    if RANK_STEP < R:
        mask = mask & (rank < multiple(r, RANK_STEP))
    value = tl.load(small_ptr + rank * stride_rank + col * stride_col, mask=mask, other=0.0)
    if value.dtype != dtype:
        value = value.to(tl.float32).to(dtype)
    return value


@triton.jit
def project(
    left_ptr, small_ptr, first_row, rows_left, first_tile, tiles, segment_tiles, length, r, stride_row,
    stride_rank, stride_small, seed, threshold, calls_per_row,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the rows ``first_row ...`` of ``left @ small.T`` as a float32 (BLOCK_M, R) tile, summed over ``tiles``
    tiles of BLOCK_L columns from ``first_tile`` on.

    ``left`` is (M, length) and streamed once, ``small`` is (r, length); ``rows_left`` rows of the
    tile exist. Every ``segment_tiles`` tiles are summed for themselves and added in order, as
    ``sum_partials`` adds the segments of several programs.
    """
    row, rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    row_mask = (row < rows_left)[:, None]
    left_rows = left_ptr + first_row * stride_row + row[:, None] * stride_row
    total = tl.zeros((BLOCK_M, R), tl.float32)
    segment = tl.zeros((BLOCK_M, R), tl.float32)
    left_in_segment = segment_tiles
    for tile in range(first_tile, first_tile + tiles):
        start = tile * BLOCK_L
        col = start + tl.arange(0, BLOCK_L)
        col_mask = col < length
        left = tl.load(left_rows + col[None, :], mask=row_mask & col_mask[None, :], other=0.0)
        small = load_small(
            small_ptr, rank[None, :], col[:, None], r, length, stride_rank, stride_small, left.dtype, R,
            RANK_STEP,
        )  # fmt: skip
        if DROPOUT:
            keep = keep_mask(seed, threshold, first_row, start, calls_per_row, BLOCK_M, BLOCK_L)
            left = tl.where(keep, left, 0.0).to(left.dtype)
        segment = tl.dot(left, small, segment, input_precision=PRECISION)
        left_in_segment -= 1
        if left_in_segment == 0:
            total += segment
            segment = tl.zeros((BLOCK_M, R), tl.float32)
            left_in_segment = segment_tiles
    return total + segment


@triton.jit
def sum_partials(partial_ptr, first_row, rows_left, M, count, BLOCK_M: tl.constexpr, R: tl.constexpr):
    row, rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    source = partial_ptr + first_row * R + row[:, None] * R + rank[None, :]
    total = tl.zeros((BLOCK_M, R), tl.float32)
    plane = M.to(tl.int64) * R
    for index in range(count):
        total += tl.load(source + index * plane, mask=(row < rows_left)[:, None], other=0.0)
    return total
