// The three products on pairs of bfloat16 (vdpbf16ps): lane += a0 * b0 + a1 * b1, accumulated in
// float32.
//
// Pairs run along the contracted dimension: two neighbouring columns in a dot product with P, two
// rows of P in H P, two rows of dY or x in the gradients of P.
#pragma once

#include "cpu/isa/engine.h"
#include "cpu/isa/pairs.h"

#if AFA_ISA_LEVEL >= 3

namespace afa::cpu::AFA_ISA {

struct Pair : RowGroups<Pair> {
    using Elem = bf16;
    static constexpr int kTile = kVectors * kLanes;
    static constexpr int kSlab = 512;
    static constexpr bool kOnePanel = false;
    static constexpr int kPairLanes = 2 * kLanes;

    static __m512bh pairs(const bf16* p) {
        return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
    }
    static __m512bh broadcast_pair(const bf16* p) {
        int32_t both;
        memcpy(&both, p, sizeof(both));
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
    }

    // One slab of P, tile by tile. dot: [row of P][kTile]; expand: [pair of rows of P][kTile][2].
    template <class Src>
    static void pack(const Src* p, int64_t stride_j, int64_t stride_l, int64_t r, int64_t rp,
                     int64_t cols, Elem* dot, Elem* expand) {
        const int64_t padded = round_up(cols, kTile);
        __m512i block[16];
        for (int64_t j = 0; j < rp && dot != nullptr; j += 16)
            for (int64_t c = 0; c < padded; c += kPairLanes) {
                by_rows(PairBlock<Src>{p + j * stride_j + c * stride_l, stride_l, stride_j,
                                       part_of(cols, c, kPairLanes), part_of(r, j, 16)},
                        block);
                Elem* out = dot + round_down(c, kTile) * rp + j * kTile + c % kTile;
                for (int64_t i = 0; i < min_of<int64_t>(16, rp - j); ++i)
                    _mm512_storeu_si512(out + i * kTile, block[i]);
            }
        for (int64_t j = 0; j < rp && expand != nullptr; j += 32)
            for (int64_t c = 0; c < padded; c += kLanes) {
                by_pairs(PairBlock<Src>{p + j * stride_j + c * stride_l, stride_j, stride_l,
                                        part_of(r, j, 32), part_of(cols, c, kLanes)},
                         block);
                Elem* out = expand + round_down(c, kTile) * rp + j * kTile + c % kTile * 2;
                for (int64_t i = 0; i < min_of<int64_t>(16, (rp - j) / 2); ++i)
                    _mm512_storeu_si512(out + i * 2 * kTile, block[i]);
            }
    }
    static int64_t coefficient_bytes(int64_t rows, int64_t ld) {
        return (rows + round_up(rows, 2)) * ld * static_cast<int64_t>(sizeof(bf16));
    }
    static Coefficients<Pair> view_coefficients(const float* h, int64_t rows, int64_t ld,
                                                void* memory) {
        const bf16* row_major = static_cast<const bf16*>(memory);
        return {h, row_major, row_major + rows * ld};
    }
    static Coefficients<Pair> pack_coefficients(const float* h, int64_t rows, int64_t ld,
                                                void* memory) {
        bf16* row_major = static_cast<bf16*>(memory);
        bf16* row_pairs = row_major + rows * ld;
        for (int64_t i = 0; i < rows * ld; i += 4)
            for (int64_t e = i; e < i + 4; ++e)
                from_float(h[e], row_major + e);
        for (int64_t m = 0; m < rows; m += 2)
            for (int64_t j = 0; j < ld; ++j) {
                row_pairs[m * ld + 2 * j] = row_major[m * ld + j];
                row_pairs[m * ld + 2 * j + 1] =
                    m + 1 < rows ? row_major[(m + 1) * ld + j] : bf16{0};
            }
        return view_coefficients(h, rows, ld, memory);
    }

    template <int kRows, bool kPanel>
    static void dot_rows(const bf16* x, int64_t ldx, const Elem* p, int64_t ldp, int64_t rp,
                         int64_t tiles, float* z, int64_t ldz) {
        const int64_t row = kPanel ? kTile : ldp, step = kPanel ? rp * kTile : kTile;
        for (int64_t j = 0; j < rp; j += kGroup, p += kGroup * row) {
            Vec acc[kRows][kGroup];
            for (int m = 0; m < kRows; ++m)
                for (int g = 0; g < kGroup; ++g)
                    acc[m][g] = zero();
            for (int64_t t = 0; t < tiles; ++t) {
                const bf16* tile = p + t * step;
                if (j == 0)
                    prefetch_tile(x + kRows * ldx + t * kTile, ldx, kRows);
#pragma GCC unroll 2
                for (int v = 0; v < kTile; v += kPairLanes) {
                    __m512bh left[kRows];
#pragma GCC unroll 8
                    for (int m = 0; m < kRows; ++m)
                        left[m] = pairs(x + m * ldx + t * kTile + v);
#pragma GCC unroll 4
                    for (int g = 0; g < kGroup; ++g) {
                        const __m512bh right = pairs(tile + g * row + v);
#pragma GCC unroll 8
                        for (int m = 0; m < kRows; ++m)
                            acc[m][g] = _mm512_dpbf16_ps(acc[m][g], left[m], right);
                    }
                }
            }
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m)
                add_sums(z + m * ldz + j, acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
        }
    }

    template <int kRows, class T>
    static void expand_rows(const Coefficients<Pair>& h, int64_t row, int64_t ld, int64_t r,
                            const Elem* panel, const Target<T>& target, int64_t out_row,
                            int64_t out_col, int cols) {
        const bf16* coefficients = h.rows + row * ld;
        Vec acc[kRows][kVectors];
        for (int m = 0; m < kRows; ++m)
            for (int v = 0; v < kVectors; ++v)
                acc[m][v] = zero();
        for (int64_t j = 0; j < r; j += 2) {
            __m512bh right[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                right[v] = pairs(panel + j * kTile + v * kPairLanes);
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) {
                const __m512bh left = broadcast_pair(coefficients + m * ld + j);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    acc[m][v] = _mm512_dpbf16_ps(acc[m][v], left, right[v]);
            }
        }
        write_tile(target, out_row, out_col, acc, cols);
    }

    // Rows m and m + 1 of one tile of columns as pairs, packed; an odd last row is paired with
    // zeros.
    static constexpr int kOuterRows = 2;
    static inline __attribute__((always_inline)) void
    pack_outer(const Elem* x, int64_t ldx, int64_t rows, int64_t m, Elem* packed) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v += 2) {
            const bf16* even = x + m * ldx + v * kLanes;
            const __m512i row0 = _mm512_loadu_si512(even);
            const __m512i row1 =
                m + 1 < rows ? _mm512_loadu_si512(even + ldx) : _mm512_setzero_si512();
            bf16* out = packed + m * kTile + v * kPairLanes;
            _mm512_storeu_si512(out, _mm512_unpacklo_epi16(row0, row1));
            _mm512_storeu_si512(out + kPairLanes, _mm512_unpackhi_epi16(row0, row1));
        }
    }

    using Operand = __m512bh;
    static Operand outer_right(const Elem* packed) { return pairs(packed); }
    static Operand outer_left(const Coefficients<Pair>& h, int64_t i) {
        return broadcast_pair(h.columns + i);
    }
    static Vec multiply_add(Operand left, Operand right, Vec sum) {
        return _mm512_dpbf16_ps(sum, left, right);
    }
    static void finish_sums(const Sums& sums, int64_t rp, int64_t cols) {
        for_each_row<Pair>(sums, rp, cols, sort_columns);
    }
};

}  // namespace afa::cpu::AFA_ISA

#endif
