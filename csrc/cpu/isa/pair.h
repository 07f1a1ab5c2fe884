// The engine in bfloat16, for CPUs with vdpbf16ps or bfdot: lane += a0 * b0 + a1 * b1, accumulated
// in float32.
#pragma once

#include "cpu/isa/pairs.h"
#include "cpu/isa/row_groups.h"

#if AFA_BF16_PAIRS

namespace afa::cpu::AFA_ISA {

struct Pair : RowGroups<Pair> {
    using Elem = bf16;
    using Operand = Pairs;
    static constexpr int kDepth = 2;
    static constexpr int kSlab = 512;
    static constexpr bool kOnePanel = false;

    static Operand load_operand(const bf16* p) { return load_pairs(p); }
    static Operand broadcast_operand(const bf16* p) { return broadcast_pair(p); }
    static Vec multiply_add(Operand a, Operand b, Vec sum) { return multiply_add_pairs(a, b, sum); }

    // One slab of P into the panels of row_groups.h, kLanes x kPairLanes elements at a time.
    template <class Src>
    static void pack(const Src* p, int64_t stride_j, int64_t stride_l, int64_t r, PanelRows rows,
                     int64_t cols, Elem* dot, Elem* expand) {
        const int64_t padded = round_up(cols, kTile), rp = rows.count, of = rows.of;
        const int64_t begin = rows.first * kTile;
        Pairs block[kLanes];
        for (int64_t j = 0; j < rp && dot != nullptr; j += kLanes)
            for (int64_t c = 0; c < padded; c += kPairLanes) {
                by_rows(PairBlock<Src>{p + j * stride_j + c * stride_l, stride_l, stride_j,
                                       part_of(cols, c, kPairLanes), part_of(r, j, kLanes)},
                        block);
                Elem* out = dot + begin + round_down(c, kTile) * of + j * kTile + c % kTile;
                for (int64_t i = 0; i < min_of<int64_t>(kLanes, rp - j); ++i)
                    store_pairs(out + i * kTile, block[i]);
            }
        for (int64_t j = 0; j < rp && expand != nullptr; j += kPairLanes)
            for (int64_t c = 0; c < padded; c += kLanes) {
                by_pairs(PairBlock<Src>{p + j * stride_j + c * stride_l, stride_j, stride_l,
                                        part_of(r, j, kPairLanes), part_of(cols, c, kLanes)},
                         block);
                Elem* out = expand + begin + round_down(c, kTile) * of + j * kTile + c % kTile * 2;
                for (int64_t i = 0; i < min_of<int64_t>(kLanes, (rp - j) / 2); ++i)
                    store_pairs(out + i * 2 * kTile, block[i]);
            }
    }
    static int64_t coefficient_bytes(int64_t rows, int64_t ld) {
        return (rows + round_up(rows, 2)) * ld * static_cast<int64_t>(sizeof(bf16));
    }
    static Coefficients<Pair> view_coefficients(const float*, int64_t rows, int64_t ld,
                                                void* memory) {
        const bf16* row_major = static_cast<const bf16*>(memory);
        return {row_major, row_major + rows * ld};
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

    // Rows m and m + 1 of one tile of columns as pairs; an odd last row is paired with zeros.
    static inline __attribute__((always_inline)) void
    pack_outer(const Elem* x, int64_t ldx, int64_t rows, int64_t m, Elem* packed) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v += 2) {
            const bf16* even = x + m * ldx + v * kLanes;
            const Pairs row0 = load_pairs(even);
            const Pairs row1 = m + 1 < rows ? load_pairs(even + ldx) : zero_pairs();
            store_row_pairs(packed + m * kTile + v * kPairLanes, row0, row1);
        }
    }

    static void finish_sums(const Sums& sums, int64_t rp, int64_t cols) {
        for_each_row<Pair>(sums, rp, cols, sort_columns);
    }
};

}  // namespace afa::cpu::AFA_ISA

#endif
