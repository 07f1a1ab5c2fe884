// Where the rows of a product go: columns of any strides, added to a base or not, into the cache or
// past it.
#pragma once

#if defined(__unix__)
#include <unistd.h>
#endif

#include "cpu/isa/vec.h"

namespace afa::cpu::AFA_ISA {

constexpr int kVectors = 4;                            // per tile
constexpr int kGroup = 4;                              // rows of P at a time
constexpr int kRowGroup = AFA_ISA_LEVEL >= 2 ? 6 : 3;  // rows of x or h at a time

// Where a product H P is written: out = base + scale * (H P), T at the top left corner of the
// block.
template <class T>
struct Target {
    T* out;
    int64_t out_row, out_col;
    const T* base;  // null: zero
    int64_t base_row, base_col;
    float scale;
    bool streams;  // the result bypasses the cache
};

// From this size on a fresh result (not one that is accumulated into) bypasses the cache: each line
// would first be read from memory, and has left the cache again before long. 4 MB were faster past
// 32 MB of L3 (Zen 4, bfloat16: 5 to 15%) even where the next operation reads them at once; behind
// the 480 MB of a Xeon 8 MB were not.
static inline int64_t stream_bytes() {
    constexpr int64_t kLeast = int64_t{4} << 20, kMost = int64_t{12} << 20;
    int64_t share = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    static const int64_t l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);  // 0 where unknown
    share = l3 / 8;
#endif
    return share < kLeast ? kLeast : min_of(share, kMost);
}
template <class T>
static inline bool can_stream(const Matrix& out, int64_t rows, int64_t cols) {
    const int64_t size = sizeof(T);
    return rows * cols * size >= stream_bytes() && out.col_stride == 1 &&
           out.row_stride * size % 64 == 0 && reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
}

// One vector of the result into the cache or past it.
template <class T>
static inline void put(const Target<T>& t, T* out, Vec value) {
    if (t.streams)
        stream(out, value);
    else
        store(out, value);
}

// The first `cols` columns of a tile, of any strides.
template <class T>
static void write_partial(const Target<T>& t, int64_t row, int64_t col, const float* tile, int rows,
                          int cols) {
    constexpr int kTile = kVectors * kLanes;
    for (int m = 0; m < rows; ++m) {
        T* out = t.out + (row + m) * t.out_row + col * t.out_col;
        const T* base =
            t.base == nullptr ? nullptr : t.base + (row + m) * t.base_row + col * t.base_col;
        for (int c = 0; c < cols; ++c) {
            const float sum = tile[m * kTile + c];
            const float value =
                base == nullptr ? t.scale * sum : fma(t.scale, sum, to_float(base[c * t.base_col]));
            from_float(value, out + c * t.out_col);
        }
    }
}

template <int kRows, class T>
static inline __attribute__((always_inline)) void
write_tile(const Target<T>& t, int64_t row, int64_t col, const Vec (&acc)[kRows][kVectors],
           int cols) {
    constexpr int kTile = kVectors * kLanes;
    const Vec scale = broadcast(t.scale);
    if (cols == kTile && t.out_col == 1 && (t.base == nullptr || t.base_col == 1)) {
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            T* out = t.out + (row + m) * t.out_row + col;
            if (t.base == nullptr) {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    put(t, out + v * kLanes, scale * acc[m][v]);
            } else {
                const T* base = t.base + (row + m) * t.base_row + col;
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    put(t, out + v * kLanes, fma(scale, acc[m][v], load(base + v * kLanes)));
            }
        }
        return;
    }
    float tile[kRows * kTile];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            store(tile + m * kTile + v * kLanes, acc[m][v]);
    write_partial(t, row, col, tile, kRows, cols);
}

// Asks for the next tile of the rows that are about to be written: rows lie pages apart, so no
// hardware prefetcher follows, and by the time the other rows of this tile are done the lines have
// come.
template <class T>
static inline void prefetch_next_tile(const Target<T>& t, int64_t row, int64_t col, int rows) {
    constexpr int kStep = 64 / sizeof(T);
    const T* out = t.out + row * t.out_row + (col + kVectors * kLanes) * t.out_col;
    for (int m = 0; m < rows && !t.streams; ++m)
        for (int c = 0; c < kVectors * kLanes; c += kStep)
            __builtin_prefetch(out + m * t.out_row + c, 1);
    if (t.base == nullptr || t.base == t.out)
        return;
    const T* base = t.base + row * t.base_row + (col + kVectors * kLanes) * t.base_col;
    for (int m = 0; m < rows; ++m)
        for (int c = 0; c < kVectors * kLanes; c += kStep)
            __builtin_prefetch(base + m * t.base_row + c);
}

}  // namespace afa::cpu::AFA_ISA
