"""Device functions that the kernels share: which rows a program takes and what their owner brings, the activation, the
dropout mask, and the streamed product.

``ends_ptr`` points to the offsets of a call by owner, (G,) int32: where the rows of each owner end. They are read here
and nowhere on the host. Values that break their contract give wrong results, but no access outside of x. Where one
owner has all rows ``ends_ptr`` is None, and so are G, ``ranks_ptr`` and the strides from owner to owner: what is None
is a constant to the compiler, so that such a call pays for nothing that owners need.
"""

import triton
import triton.language as tl

# In the interpreter a constexpr times a tensor is no tensor: the tensor goes first.
_COLUMNS_PER_CALL = tl.constexpr(16)  # afa_kernels.operator.dropout.COLUMNS_PER_CALL
_SQRT_HALF = tl.constexpr(0.70710678118654752440)
_SQRT_2_OVER_PI = tl.constexpr(0.79788456080286535588)
_INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
_GELU_TANH_CUBIC = tl.constexpr(0.044715)
_LEAKY_SLOPE = tl.constexpr(0.01)
_ENDS_AT_A_TIME = tl.constexpr(256)

# Arguments of any kernel whose other value, alignment or stride must not compile another one: neither a new alpha_t nor
# a new M does.
UNSPECIALIZED = (
    "M", "G", "ends_ptr", "ranks_ptr", "alpha_ptr", "stride_alpha", "scaling_ptr", "stride_scaling", "seed_ptr",
    "threshold", "segment_tiles", "segments", "tiles", "count", "blocks_a", "rows_per_chunk", "parts", "chunks",
    "chunks_per_part", "parts_a", "chunks_per_part_a", "parts_b", "chunks_per_part_b",
)  # fmt: skip


@triton.jit
def rows_of(owner, ends_ptr, ranks_ptr, M, G, r):
    """Return the first row of an owner, the row behind its last one, and its rank. Owner G is the rows behind the last
    offset, whose rank is 0."""
    first = tl.load(ends_ptr + owner - 1, mask=owner > 0, other=0)
    end = tl.load(ends_ptr + owner, mask=owner < G, other=M)
    first, end = tl.maximum(first, 0), tl.minimum(end, M)
    if ranks_ptr is not None:
        rank = tl.minimum(tl.load(ranks_ptr + owner, mask=owner < G, other=0), r)
    else:
        rank = tl.where(owner < G, r, 0)
    return first, end, rank


@triton.jit
def find_tile(tile, ends_ptr, ranks_ptr, M, G, r, BLOCK_M: tl.constexpr):
    """Return what the tile of rows with this number is: its owner, the rank of that, which is 0 for rows without a
    branch, its first row (int64) and its rows.

    The tiles of an owner begin at its first row, as in a call with that owner alone. Its first tile has the number
    ``first row // BLOCK_M + owner``: then no two owners share a number, M // BLOCK_M + G + 1 programs are enough, and a
    program finds its owner by counting those that begin no later. Numbers between two owners have no rows (0 or less).
    """
    if ends_ptr is None:
        first_row = tile.to(tl.int64) * BLOCK_M
        return 0, r, first_row, tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    else:
        owner = 0
        for start in range(0, G, _ENDS_AT_A_TIME):
            earlier = start + tl.arange(0, _ENDS_AT_A_TIME)
            end = tl.load(ends_ptr + earlier, mask=earlier < G, other=M)
            owner += tl.sum((end // BLOCK_M + earlier + 1 <= tile).to(tl.int32))
        first, end, rank = rows_of(owner, ends_ptr, ranks_ptr, M, G, r)
        number = tile - (first // BLOCK_M + owner)
        first_row = first + number * BLOCK_M
        rows_left = tl.where(number >= 0, tl.minimum(end - first_row, BLOCK_M), 0)
        return owner, rank, first_row.to(tl.int64), rows_left


@triton.jit
def find_chunks(
    ends_ptr, ranks_ptr, M, G, r, rows_per_chunk, parts, chunks, chunks_per_part, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Return what this program goes over for a sum over rows: owner, rank, first row (int64), rows (0 or less: none),
    and by owner the tiles of a chunk.

    One owner: a chunk of ``rows_per_chunk`` rows. By owner: one of the ``parts`` of an owner's rows, which are cut into
    chunks as those of a call with that owner alone, at most ``chunks``.
    """
    place = tl.program_id(1)
    if ends_ptr is None:
        first = place.to(tl.int64) * rows_per_chunk
        return 0, r, first, tl.minimum(rows_per_chunk, M - first).to(tl.int32), 0
    else:
        owner, part = place // parts, place % parts
        first, end, rank = rows_of(owner, ends_ptr, ranks_ptr, M, G, r)
        tiles_per_chunk = tl.cdiv(tl.cdiv(end - first, BLOCK_M), chunks)
        rows_per_part = chunks_per_part * tiles_per_chunk * BLOCK_M
        first += part * rows_per_part
        end = tl.minimum(first + rows_per_part, end)
        return owner, rank, first.to(tl.int64), end - first, tiles_per_chunk


@triton.jit
def rows_left_in(ends_ptr, M, first_row, rows, start, BLOCK_M: tl.constexpr):
    """Return how many rows the tile has that begins ``start`` rows into what :func:`find_chunks` found."""
    if ends_ptr is None:
        # In 64 bits: from ``rows`` the x pass of rank 64 has fewer instructions on sm_90, but more than the 128
        # registers with which two programs are resident.
        return tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    else:
        return tl.minimum(rows - start, BLOCK_M)


@triton.jit
def parts_with_rows(first, end, chunks, chunks_per_part, rows_per_tile):
    """Return for how many parts of an owner :func:`find_chunks` finds rows."""
    tiles = tl.cdiv(end - first, rows_per_tile)
    tiles_per_part = chunks_per_part * tl.cdiv(tiles, chunks)
    return tl.cdiv(tiles, tl.maximum(tiles_per_part, 1))


@triton.jit
def own(ptr, owner, stride):
    """Return a pointer to what an owner has of it; without a stride one owner has all."""
    if stride is not None:
        ptr += owner.to(tl.int64) * stride
    return ptr


@triton.jit
def load_own(ptr, owner, stride):
    return tl.load(own(ptr, owner, stride))


@triton.jit
def own_scaling(scaling_ptr, owner, stride_scaling, scaling):
    """Return the scaling of an owner: ``scaling`` without ``scaling_ptr``."""
    if scaling_ptr is not None:
        scaling = load_own(scaling_ptr, owner, stride_scaling)
    return scaling


@triton.jit
def own_factor(scaling_ptr, owner, stride_scaling, factor, threshold):
    """Return the scaling of an owner over what dropout keeps, rounded once, as ``factor`` was on the host."""
    if scaling_ptr is not None:
        factor = tl.div_rn(load_own(scaling_ptr, owner, stride_scaling) * 256.0, 256.0 - threshold)
    return factor


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
def load_alpha(alpha_ptr, owner, stride_alpha, ACT: tl.constexpr):
    """Return alpha_t of an owner; at identity there is none, and 0.0 stands for it."""
    if ACT == "identity":
        return 0.0
    else:
        return load_own(alpha_ptr, owner, stride_alpha)


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
def sum_partials(partial_ptr, first_row, rows_left, M, rank, count, BLOCK_M: tl.constexpr, R: tl.constexpr):
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, R)
    source = partial_ptr + first_row * R + row[:, None] * R + column[None, :]
    total = tl.zeros((BLOCK_M, R), tl.float32)
    plane = M.to(tl.int64) * R
    # Beyond the rank a partial is NaN where an infinity met its zeros.
    mask = (row < rows_left)[:, None] & (column < rank)[None, :]
    for index in range(count):
        total += tl.load(source + index * plane, mask=mask, other=0.0)
    return total
