// Packs a factor P into bfloat16 for instructions that multiply pairs of it: vdpbf16ps, the AMX
// tiles and bfdot.
//
// A pair are two elements that are neighbours along the dimension that a product sums over: the
// columns of P for x P^T, its rows for h P. Here d is the index along that dimension, and f the one
// along the other. An engine asks for a block of kPairLanes d by kLanes f, a register for each f or
// for each pair of d, in one of two orders:
//   by_rows    [f][d]                 pairs lie side by side in a row
//   by_pairs   [pair of d][f][2]      pairs of all f lie side by side
// Where P is contiguous along d it is loaded as rows, and where it is contiguous along f two rows
// at a time are interleaved into pairs. A transposition makes one order from the other.
//
// Each pairs_*.h defines
//   Pairs, Singles, kPairLanes   registers of kLanes pairs, that are kPairLanes elements, and of
//                                kLanes elements
//   zero_pairs(), zero_singles(), load_pairs(p), store_pairs(p, v)
//   load_pairs(p, count), load_singles(p, count)
//                                the first `count` of bfloat16 or float32, zeros behind them
//   broadcast_pair(p)            one pair in all lanes
//   multiply_add_pairs(a, b, s)  s + a0 b0 + a1 b1 in each lane, of the pairs (a0, a1) and (b0, b1)
//   interleave(even, odd)        {even[0], odd[0], even[1], odd[1], ...}
//   transpose(rows)              rows[i] lane j = rows[j] lane i
//   store_row_pairs(p, row0, row1)
//                                the pairs of two rows in two registers, in any order of columns
//   sort_columns(sums)           brings one row of a tile of sums from that order into that of the
//                                columns
#pragma once

#include <type_traits>

#include "cpu/isa/vec.h"

#if AFA_BF16_PAIRS

#if AFA_NEON_LEVEL >= 2
#include "cpu/isa/pairs_neon.h"
#else
#include "cpu/isa/pairs_avx512.h"
#endif

namespace afa::cpu::AFA_ISA {

// A block of P: element (d, f) at p[d * d_stride + f * f_stride], of which `depth` (up to
// kPairLanes) by `width` (up to kLanes) exist.
template <class Src>
struct PairBlock {
    const Src* p;
    int64_t d_stride, f_stride;
    int depth, width;
};

// v = [f][d], from a block that is contiguous along d.
template <class Src>
static inline void rows_along(const PairBlock<Src>& b, Pairs (&v)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
        v[i] = i < b.width ? load_pairs(b.p + i * b.f_stride, b.depth) : zero_pairs();
}
// v = [pair of d][f][2], from a block that is contiguous along f.
template <class Src>
static inline void pairs_down(const PairBlock<Src>& b, Pairs (&v)[kLanes]) {
    const auto row = [&](int d) {
        return d < b.depth ? load_singles(b.p + d * b.d_stride, b.width) : zero_singles();
    };
    for (int i = 0; i < kLanes; ++i)
        v[i] = interleave(row(2 * i), row(2 * i + 1));
}

// How many of `count` elements are left for a block of `most` at `begin`.
static inline int part_of(int64_t count, int64_t begin, int most) {
    return static_cast<int>(begin < count ? min_of<int64_t>(most, count - begin) : 0);
}

// Calls f with a block of bfloat16 or float32 that is contiguous along d or f: `b` itself or a
// copy.
template <class Src, class F>
static inline void with_contiguous(const PairBlock<Src>& b, F&& f) {
    if constexpr (std::is_same_v<Src, bf16> || std::is_same_v<Src, float>)
        if (b.d_stride == 1 || b.f_stride == 1)
            return f(b);
    bf16 copy[kLanes * kPairLanes];
    for (int i = 0; i < b.width; ++i)
        for (int d = 0; d < b.depth; ++d)
            from_float(to_float(b.p[i * b.f_stride + d * b.d_stride]), copy + i * kPairLanes + d);
    f(PairBlock<bf16>{copy, 1, kPairLanes, b.depth, b.width});
}

// v = [pair of d][f][2]
template <class Src>
static inline void by_pairs(const PairBlock<Src>& block, Pairs (&v)[kLanes]) {
    with_contiguous(block, [&](const auto& b) {
        if (b.d_stride != 1)
            return pairs_down(b, v);
        rows_along(b, v);
        transpose(v);
    });
}
// v = [f][d]
template <class Src>
static inline void by_rows(const PairBlock<Src>& block, Pairs (&v)[kLanes]) {
    with_contiguous(block, [&](const auto& b) {
        if (b.d_stride == 1)
            return rows_along(b, v);
        pairs_down(b, v);
        transpose(v);
    });
}

}  // namespace afa::cpu::AFA_ISA

#endif
