// Where the rows of a product are written: with any strides, added to a base or not, into the cache
// or past it.
#pragma once

#if defined(__unix__)
#include <unistd.h>
#endif

#include "cpu/isa/stream.h"

namespace afa::cpu::AFA_ISA {

constexpr int kVectors = 4;                                    // per tile
constexpr int kGroup = 4;                                      // rows of P at a time
constexpr int kRowGroup = AFA_VECTOR_REGISTERS >= 32 ? 6 : 3;  // rows of x or h at a time

// out = base + H P. The pointers are those of the first element of the block that is written.
template <class T>
struct Target {
    T* out;
    int64_t out_row, out_col;
    const T* base;  // null: zero
    int64_t base_row, base_col;
    bool streams;  // the result bypasses the cache
};

// From this size on a result bypasses the cache, unless it is accumulated into: an ordinary store
// first reads the line from memory, and a large result has left the cache again before long. The
// limit, an eighth of L3, is measured: with 32 MB of L3 (Zen 4) results of 4 MB gained 5 to 15% in
// bfloat16, even where the next operation reads them at once; on a Xeon with 480 MB results gained
// from 12 MB on.
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
            from_float(base == nullptr ? sum : sum + to_float(base[c * t.base_col]),
                       out + c * t.out_col);
        }
    }
}

// A whole tile, dense along its rows.
template <bool kStreams, bool kBase, int kRows, class T>
static inline __attribute__((always_inline)) void
write_whole(const Target<T>& t, int64_t row, int64_t col, const Vec (&acc)[kRows][kVectors]) {
    T* out = t.out + row * t.out_row + col;
    const T* base = kBase ? t.base + row * t.base_row + col : out;
    const int64_t out_row = t.out_row, base_row = kBase ? t.base_row : out_row;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m, out += out_row, base += base_row)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v += 2) {
            Vec low = acc[m][v], high = acc[m][v + 1];
            if (kBase) {
                low = low + load(base + v * kLanes);
                high = high + load(base + (v + 1) * kLanes);
            }
            if (kStreams)
                stream2(out + v * kLanes, low, high);
            else
                store2(out + v * kLanes, low, high);
        }
}

template <int kRows, class T>
static inline __attribute__((always_inline)) void
write_tile(const Target<T>& t, int64_t row, int64_t col, const Vec (&acc)[kRows][kVectors],
           int cols) {
    constexpr int kTile = kVectors * kLanes;
    if (cols == kTile && t.out_col == 1 && (t.base == nullptr || t.base_col == 1)) {
        if (t.streams)
            return t.base == nullptr ? write_whole<true, false>(t, row, col, acc)
                                     : write_whole<true, true>(t, row, col, acc);
        return t.base == nullptr ? write_whole<false, false>(t, row, col, acc)
                                 : write_whole<false, true>(t, row, col, acc);
    }
    float tile[kRows * kTile];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            store(tile + m * kTile + v * kLanes, acc[m][v]);
    write_partial(t, row, col, tile, kRows, cols);
}

// Asks for `rows` rows of one tile, only as far as L2: L1 holds panels.
template <class T>
static inline void prefetch_tile(const T* p, int64_t row_stride, int rows) {
    constexpr int kStep = 64 / sizeof(T), kL2 = 2;
    for (int m = 0; m < rows; ++m)
        for (int c = 0; c < kVectors * kLanes; c += kStep)
            __builtin_prefetch(p + m * row_stride + c, 0, kL2);
}

// The same for a tile that is going to be written, and for what is added to it.
template <class T>
static inline void prefetch_target(const Target<T>& t, int64_t row, int64_t col, int rows) {
    if (!t.streams)
        prefetch_tile(t.out + row * t.out_row + col * t.out_col, t.out_row, rows);
    if (t.base != nullptr && t.base != t.out)
        prefetch_tile(t.base + row * t.base_row + col * t.base_col, t.base_row, rows);
}

}  // namespace afa::cpu::AFA_ISA
