// Tiles: global -> shared memory, shared memory -> mma fragments, dropout, and phi with the
// activation chosen at run time.
//
// A tile of kCols columns lies in shared memory with kPad elements between rows: rows are then an
// odd number of 16-byte slots apart, so that the eight rows of an ldmatrix never meet in a bank.
#pragma once

#include "common/activation.h"
#include "common/philox.h"
#include "cuda/kernels/params.h"
#include "cuda/kernels/prim.cuh"
#include "cuda/kernels/tiles.h"

namespace afa {

// The order of a 32-row group of B in shared memory. mma gives a lane columns 2q and 2q + 1 of each
// of four 8-column tiles; in this order they are eight neighbouring columns of y, so that a lane
// stores 16 bytes.
AFA_DEVICE int column_order(int row) {
    return (row & ~31) | ((row >> 1 & 3) << 3) | ((row >> 3 & 3) << 1) | (row & 1);
}

// Starts copying rows [row0, row0 + kRows) and columns [col0, col0 + kCols) of a (rows, cols)
// matrix into `tile`; what lies outside the matrix becomes 0. cols must be a multiple of 8.
template <int kRows, int kCols, int kThreads, bool kReorder = false, typename T>
AFA_DEVICE void load_tile(T* tile, const T* matrix, int64_t stride, int64_t row0, int64_t rows,
                          int col0, int cols) {
    constexpr int kVectors = kCols / kVector, kStep = kThreads / kVectors;
    static_assert(kThreads % kVectors == 0);
    const int col = thread_index() % kVectors * kVector;
    const int first = thread_index() / kVectors;
    const T* source = matrix + (row0 + first) * stride + col0 + col;
    const bool col_valid = col0 + col < cols;
    AFA_UNROLL
    for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
        const int row = first + i * kStep;
        if (kRows % kStep != 0 && row >= kRows)
            break;
        const bool valid = col_valid && row0 + row < rows;
        T* target = tile + (kReorder ? column_order(row) : row) * pitch(kCols) + col;
        copy_async(target, valid ? source : matrix, valid);
        source += kStep * stride;
    }
}

// The same of rows [row0, row0 + kRows) and columns [col0, col0 + kCols) of a weight.
template <int kRows, int kCols, int kThreads, bool kReorder = false, typename T>
AFA_DEVICE void load_weight(T* tile, const Weight& w, int64_t row0, int col0) {
    load_tile<kRows, kCols, kThreads, kReorder>(tile, static_cast<const T*>(w.data), w.row_stride,
                                                row0, w.rows, col0, w.cols);
}

// Member i, chosen by comparisons: an index that is known at run time only would copy all
// parameters to local memory.
template <typename Member>
AFA_DEVICE Member member_at(const Member (&members)[kMaxMembers], int i) {
    Member found = members[0];
    if (i == 1)
        found = members[1];
    if (i == 2)
        found = members[2];
    return found;
}
// The member that has tile, slab or block `index` of those of all members.
template <typename Member>
AFA_DEVICE Member member_with(const Member (&members)[kMaxMembers], int index) {
    return member_at(members, (index >= members[1].first) + (index >= members[2].first));
}

// Waits until the oldest tile of a ring of `stages` is complete.
AFA_DEVICE void wait_oldest(int stages) {
    if (stages == 2)
        copy_wait<0>();
    else if (stages == 3)
        copy_wait<1>();
    else if (stages == 4)
        copy_wait<2>();
    else
        copy_wait<3>();
}

// Element offset, in a row-major tile, of what this lane points ldmatrix to for a 16x16 piece whose
// matrices count down first, then right ...
template <int kPitch>
AFA_DEVICE int down_first() {
    return (lane_index() & 15) * kPitch + (lane_index() >> 4) * 8;
}
// ... or right first, then down.
template <int kPitch>
AFA_DEVICE int right_first() {
    return ((lane_index() & 7) + ((lane_index() >> 4) << 3)) * kPitch +
           ((lane_index() >> 3) & 1) * 8;
}

// Zeroes the dropped ones of 16 elements that start at column 16 * group of `row`, and returns the
// mask, bit j for column j.
AFA_DEVICE uint32_t keep_bits(uint64_t seed, int threshold, int64_t row, int64_t calls_per_row,
                              int64_t group) {
    const Philox4 bytes = dropout_bytes(seed, row, calls_per_row, group);
    uint32_t bits = 0;
    AFA_UNROLL
    for (int j = 0; j < kDropoutColumns; ++j)
        bits |= static_cast<uint32_t>(dropout_keeps(bytes, j, threshold)) << j;
    return bits;
}

// Eight elements with those zeroed whose bit is not set.
AFA_DEVICE Vec16 keep(Vec16 v, uint32_t bits) {
    AFA_UNROLL
    for (int j = 0; j < 4; ++j)
        v.word[j] &=
            (bits >> 2 * j & 1 ? 0x0000FFFFu : 0u) | (bits >> (2 * j + 1) & 1 ? 0xFFFF0000u : 0u);
    return v;
}

// Applies dropout in shared memory to kRows x kCols elements; the lanes of one warp share the work.
// `row` and `col` say where in x the piece begins. The mask of each 16 elements is left in `masks`
// (kRows x kCols / 16), where that is given.
template <int kRows, int kCols, int kPitch, typename T>
AFA_DEVICE void drop(T* piece, uint16_t* masks, int mask_pitch, const DropoutParams& dropout,
                     int64_t row, int col, int cols, bool apply) {
    constexpr int kGroups = kCols / kDropoutColumns;
    const uint64_t seed = static_cast<uint64_t>(load_global(dropout.seed));
    const int64_t calls_per_row = (cols + kDropoutColumns - 1) / kDropoutColumns;
    AFA_ROLLED
    for (int i = lane_index(); i < kRows * kGroups; i += kWarpSize) {
        const int r = i / kGroups, group = i % kGroups;
        const uint32_t bits = keep_bits(seed, dropout.threshold, dropout.first_row + row + r,
                                        calls_per_row, col / kDropoutColumns + group);
        if (masks)
            store_shared(masks + r * mask_pitch + group, static_cast<uint16_t>(bits));
        if (apply) {
            T* p = piece + r * kPitch + group * kDropoutColumns;
            store_shared(p, keep(load_shared<Vec16>(p), bits));
            store_shared(p + kVector, keep(load_shared<Vec16>(p + kVector), bits >> kVector));
        }
    }
}

// alpha_t, which a call at identity does not have.
AFA_DEVICE float alpha_of(const float* alpha_t) {
    return alpha_t == nullptr ? 0.0f : load_global(alpha_t);
}

// phi of two elements, rounded to T.
template <typename T>
AFA_DEVICE uint32_t phi_pair(int activation, uint32_t pair, float alpha_t) {
    const Float2 z = unpack<T>(pair);
    float h[2] = {z.x, z.y};
    AFA_ROLLED
    for (int i = 0; i < 2; ++i) {
        const float low = anneal_by_id(activation, h[0], alpha_t).value;
        h[0] = h[1];
        h[1] = low;
    }
    return pack<T>(h[0], h[1]);
}

// Two elements of a row-major (rows, r) matrix, columns col and col + 1; 0 beyond r. `row` must
// exist.
template <typename T>
AFA_DEVICE uint32_t load_pair(const T* matrix, int64_t row, int r, int col) {
    const T* p = matrix + row * r + col;
    if ((r & 1) == 0)
        return col < r ? load_global(reinterpret_cast<const uint32_t*>(p)) : 0u;
    const uint32_t low = col < r ? load_global(reinterpret_cast<const uint16_t*>(p)) : 0u;
    const uint32_t high = col + 1 < r ? load_global(reinterpret_cast<const uint16_t*>(p + 1)) : 0u;
    return low | high << 16;
}

// A pair of columns col and col + 1 with zeros for those from r on. What pads a rank has to be zero
// on both sides of a product: zero times what an infinite x or dy has made of it is NaN.
AFA_DEVICE uint32_t within_rank(uint32_t pair, int col, int r) {
    return col + 1 < r ? pair : col < r ? pair & 0xFFFFu : 0u;
}

template <typename T>
AFA_DEVICE void store_pair(T* matrix, int64_t row, int r, int col, uint32_t pair) {
    T* p = matrix + row * r + col;
    if ((r & 1) == 0) {
        if (col < r)
            store_global(reinterpret_cast<uint32_t*>(p), pair);
        return;
    }
    if (col < r)
        store_global(reinterpret_cast<uint16_t*>(p), static_cast<uint16_t>(pair));
    if (col + 1 < r)
        store_global(reinterpret_cast<uint16_t*>(p + 1), static_cast<uint16_t>(pair >> 16));
}

}  // namespace afa
