// The three products in float32: operands of 16 bits are widened when they are staged.
//
// A panel holds the small factor P (r, L): [tile][row of P, padded to 4][kTile columns], zeros
// beyond r and L. The same panel serves both products with P. Rows of `x` are staged or direct,
// always padded with zeros to whole tiles.
#pragma once

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

// Whether a fresh result (not one that is accumulated into) bypasses the cache: from this size on
// it would not stay there.
constexpr int64_t kStreamBytes = int64_t{12} << 20;
template <class T>
static inline bool can_stream(const Matrix& out, int64_t rows, int64_t cols) {
    const int64_t size = sizeof(T);
    return rows * cols * size >= kStreamBytes && out.col_stride == 1 &&
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

// The rows of h or dz in the formats that the products read.
template <class E>
struct Coefficients {
    const float* wide;                  // [rows][ld]
    const typename E::Elem* rows;       // [rows][ld], as the factor of P
    const typename E::Elem* row_pairs;  // [rows / 2][ld][2], as the factor of dY or x
};

struct Wide {
    using Elem = float;
    static constexpr int kTile = kVectors * kLanes;
    static constexpr int kSlab = 256;
    static constexpr bool kOnePanel = true;

    static void pack_dot(const float* tile, int64_t r4, Elem* panel) {
        memcpy(panel, tile, r4 * kTile * sizeof(float));
    }
    static void pack_expand(const float* tile, int64_t r4, Elem* panel) {
        pack_dot(tile, r4, panel);
    }
    static int64_t coefficient_bytes(int64_t, int64_t) { return 0; }
    static Coefficients<Wide> view_coefficients(const float* h, int64_t, int64_t, void*) {
        return {h, nullptr, nullptr};
    }
    static Coefficients<Wide> pack_coefficients(const float* h, int64_t rows, int64_t ld,
                                                void* memory) {
        return view_coefficients(h, rows, ld, memory);
    }

    template <int kRows>
    static void dot_rows(const float* x, int64_t ldx, const Elem* panel, int64_t r4, int64_t tiles,
                         float* z, int64_t ldz) {
        for (int64_t j = 0; j < r4; j += kGroup) {
            Vec acc[kRows][kGroup];
            for (int m = 0; m < kRows; ++m)
                for (int g = 0; g < kGroup; ++g)
                    acc[m][g] = zero();
            for (int64_t t = 0; t < tiles; ++t) {
                const float* p = panel + (t * r4 + j) * kTile;
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    Vec left[kRows];
#pragma GCC unroll 8
                    for (int m = 0; m < kRows; ++m)
                        left[m] = load(x + m * ldx + t * kTile + v * kLanes);
#pragma GCC unroll 4
                    for (int g = 0; g < kGroup; ++g) {
                        const Vec right = load(p + g * kTile + v * kLanes);
#pragma GCC unroll 8
                        for (int m = 0; m < kRows; ++m)
                            acc[m][g] = fma(left[m], right, acc[m][g]);
                    }
                }
            }
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m)
                add_sums(z + m * ldz + j, acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
        }
    }

    // out rows x tile = h P + base
    template <int kRows, class T>
    static void expand_rows(const Coefficients<Wide>& h, int64_t row, int64_t ld, int64_t r,
                            const Elem* panel, const Target<T>& target, int64_t out_row,
                            int64_t out_col, int cols) {
        prefetch_next_tile(target, out_row, out_col, kRows);
        const float* coefficients = h.wide + row * ld;
        Vec acc[kRows][kVectors];
        for (int m = 0; m < kRows; ++m)
            for (int v = 0; v < kVectors; ++v)
                acc[m][v] = zero();
        for (int64_t j = 0; j < r; ++j) {
            Vec right[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                right[v] = load(panel + j * kTile + v * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) {
                const Vec left = broadcast(coefficients[m * ld + j]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    acc[m][v] = fma(left, right[v], acc[m][v]);
            }
        }
        write_tile(target, out_row, out_col, acc, cols);
    }

    // One tile of columns of `rows` rows, packed. Rows of x lie a power of two apart more often
    // than not, and then fall into one set of the L1 cache: without the copy each group of rows of
    // P would fetch them from L2 again.
    static void pack_outer(const Elem* x, int64_t ldx, int64_t rows, Elem* packed) {
        for (int64_t m = 0; m < rows; ++m)
            for (int v = 0; v < kVectors; ++v)
                store(packed + m * kTile + v * kLanes, load(x + m * ldx + v * kLanes));
    }

    // sums[j][tile columns] += sum over rows of h[row][j] * x[row][column], x packed
    static void outer(const Coefficients<Wide>& h, int64_t rows, int64_t ld, const Elem* packed,
                      int64_t r4, float* sums, int64_t ld_sums) {
        constexpr int kWidth = AFA_ISA_LEVEL >= 2 ? 4 : 2;
        for (int v0 = 0; v0 < kVectors; v0 += kWidth)
            for (int64_t j = 0; j < r4; j += kGroup) {
                Vec acc[kGroup][kWidth];
                for (int g = 0; g < kGroup; ++g)
                    for (int v = 0; v < kWidth; ++v)
                        acc[g][v] = zero();
                for (int64_t m = 0; m < rows; ++m) {
                    Vec right[kWidth];
#pragma GCC unroll 4
                    for (int v = 0; v < kWidth; ++v)
                        right[v] = load(packed + m * kTile + (v0 + v) * kLanes);
#pragma GCC unroll 4
                    for (int g = 0; g < kGroup; ++g) {
                        const Vec left = broadcast(h.wide[m * ld + j + g]);
#pragma GCC unroll 4
                        for (int v = 0; v < kWidth; ++v)
                            acc[g][v] = fma(left, right[v], acc[g][v]);
                    }
                }
                for (int g = 0; g < kGroup; ++g)
                    for (int v = 0; v < kWidth; ++v) {
                        float* sum = sums + (j + g) * ld_sums + (v0 + v) * kLanes;
                        store(sum, load(sum) + acc[g][v]);
                    }
            }
    }
};

// --- row groups
// -----------------------------------------------------------------------------------------------------

// z[rows][r4] += x P^T over `tiles` tiles of columns.
template <class E>
static void dot(const typename E::Elem* x, int64_t ldx, int64_t rows, const typename E::Elem* panel,
                int64_t r4, int64_t tiles, float* z, int64_t ldz) {
    int64_t m = 0;
    for (; m + kRowGroup <= rows; m += kRowGroup)
        E::template dot_rows<kRowGroup>(x + m * ldx, ldx, panel, r4, tiles, z + m * ldz, ldz);
    x += m * ldx;
    z += m * ldz;
    switch (rows - m) {
    case 1:
        return E::template dot_rows<1>(x, ldx, panel, r4, tiles, z, ldz);
    case 2:
        return E::template dot_rows<2>(x, ldx, panel, r4, tiles, z, ldz);
#if AFA_ISA_LEVEL >= 2
    case 3:
        return E::template dot_rows<3>(x, ldx, panel, r4, tiles, z, ldz);
    case 4:
        return E::template dot_rows<4>(x, ldx, panel, r4, tiles, z, ldz);
    case 5:
        return E::template dot_rows<5>(x, ldx, panel, r4, tiles, z, ldz);
#endif
    }
}

// Columns [col, col + cols) of rows [0, rows) of the target, one tile.
template <class E, class T>
static void expand(const Coefficients<E>& h, int64_t row, int64_t rows, int64_t ld, int64_t r,
                   const typename E::Elem* panel, const Target<T>& target, int64_t out_row,
                   int64_t col, int cols) {
    int64_t m = 0;
    for (; m + kRowGroup <= rows; m += kRowGroup)
        E::template expand_rows<kRowGroup>(h, row + m, ld, r, panel, target, out_row + m, col,
                                           cols);
    row += m;
    out_row += m;
    switch (rows - m) {
    case 1:
        return E::template expand_rows<1>(h, row, ld, r, panel, target, out_row, col, cols);
    case 2:
        return E::template expand_rows<2>(h, row, ld, r, panel, target, out_row, col, cols);
#if AFA_ISA_LEVEL >= 2
    case 3:
        return E::template expand_rows<3>(h, row, ld, r, panel, target, out_row, col, cols);
    case 4:
        return E::template expand_rows<4>(h, row, ld, r, panel, target, out_row, col, cols);
    case 5:
        return E::template expand_rows<5>(h, row, ld, r, panel, target, out_row, col, cols);
#endif
    }
}

}  // namespace afa::cpu::AFA_ISA
