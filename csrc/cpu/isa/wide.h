// The three products in float32: operands of 16 bits are widened when they are staged.
//
// A panel holds the small factor P (r, L): [tile][row of P, padded to 4][kTile columns], zeros
// beyond r and L. The same panel serves both products with P. Rows of `x` are staged or direct,
// always padded with zeros to whole tiles.
#pragma once

#include "cpu/isa/engine.h"

namespace afa::cpu::AFA_ISA {

struct Wide : RowGroups<Wide> {
    using Elem = float;
    static constexpr int kTile = kVectors * kLanes;
    static constexpr int kSlab = 256;
    static constexpr bool kOnePanel = true;

    static int64_t coefficient_bytes(int64_t, int64_t) { return 0; }
    static Coefficients<Wide> view_coefficients(const float* h, int64_t, int64_t, void*) {
        return {h, nullptr, nullptr};
    }
    static Coefficients<Wide> pack_coefficients(const float* h, int64_t rows, int64_t ld,
                                                void* memory) {
        return view_coefficients(h, rows, ld, memory);
    }

    template <int kRows, bool kPanel>
    static void dot_rows(const float* x, int64_t ldx, const Elem* p, int64_t ldp, int64_t rp,
                         int64_t tiles, float* z, int64_t ldz) {
        const int64_t row = kPanel ? kTile : ldp, step = kPanel ? rp * kTile : kTile;
        for (int64_t j = 0; j < rp; j += kGroup, p += kGroup * row) {
            Vec acc[kRows][kGroup];
            for (int m = 0; m < kRows; ++m)
                for (int g = 0; g < kGroup; ++g)
                    acc[m][g] = zero();
            for (int64_t t = 0; t < tiles; ++t) {
                const float* tile = p + t * step;
                if (j == 0)
                    prefetch_tile(x + kRows * ldx + t * kTile, ldx, kRows);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    Vec left[kRows];
#pragma GCC unroll 8
                    for (int m = 0; m < kRows; ++m)
                        left[m] = load(x + m * ldx + t * kTile + v * kLanes);
#pragma GCC unroll 4
                    for (int g = 0; g < kGroup; ++g) {
                        const Vec right = load(tile + g * row + v * kLanes);
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

    // Row m of one tile of columns, packed. Rows of x lie a power of two apart more often than
    // not, and then fall into one set of the L1 cache: without the copy each group of rows of P
    // would fetch them from L2 again.
    static constexpr int kOuterRows = 1;
    static inline __attribute__((always_inline)) void pack_outer(const Elem* x, int64_t ldx,
                                                                 int64_t, int64_t m, Elem* packed) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            store(packed + m * kTile + v * kLanes, load(x + m * ldx + v * kLanes));
    }

    using Operand = Vec;
    static Operand outer_right(const Elem* packed) { return load(packed); }
    static Operand outer_left(const Coefficients<Wide>& h, int64_t i) {
        return broadcast(h.wide[i]);
    }
    static Vec multiply_add(Operand left, Operand right, Vec sum) { return fma(left, right, sum); }
};

}  // namespace afa::cpu::AFA_ISA
