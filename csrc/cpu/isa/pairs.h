// Packs a factor P into bfloat16 for vdpbf16ps and the AMX tiles, 32 x 16 elements at a time.
//
// Both multiply pairs of elements that are neighbours along the dimension that a product sums over:
// the columns of P for x P^T, its rows for h P. Here d is the index along that dimension, and f the
// one along the other. An engine asks for a block of 32 d by 16 f in one of two orders:
//   by_rows    [f][d]                 pairs lie side by side in a row
//   by_pairs   [pair of d][f][2]      pairs of all f lie side by side
// Where P is contiguous along d it is loaded as rows, and where it is contiguous along f two rows
// at a time are interleaved into pairs. transpose16 makes one order from the other.
#pragma once

#include <type_traits>

#include "cpu/isa/target.h"

#if AFA_ISA_LEVEL >= 3

namespace afa::cpu::AFA_ISA {

// rows[i] lane j = rows[j] lane i, 32-bit lanes. A call would send all rows through memory.
static inline __attribute__((always_inline)) void transpose16(__m512i (&rows)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int e = 0; e < 2; ++e) {
            rows[i + 2 * e] = _mm512_unpacklo_epi64(t[i + e], t[i + e + 2]);
            rows[i + 2 * e + 1] = _mm512_unpackhi_epi64(t[i + e], t[i + e + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

// {even[0], odd[0], even[1], odd[1], ...}
static inline __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// The first `count` of 16 or 32 elements in bfloat16, zeros behind them.
static inline __m256i load16(const bf16* p, int count) {
    return _mm256_maskz_loadu_epi16(first(count), p);
}
static inline __m256i load16(const float* p, int count) {
    return narrow_bf16(load_first(p, count));
}
static inline __m512i load32(const bf16* p, int count) {
    return _mm512_maskz_loadu_epi16(count < 32 ? (uint32_t{1} << count) - 1 : ~uint32_t{0}, p);
}
static inline __m512i load32(const float* p, int count) {
    const Vec low = load_first(p, min_of(count, kLanes));
    return narrow2<bf16>(low, count > kLanes ? load_first(p + kLanes, count - kLanes) : zero());
}

// A block of P: element (d, f) at p[d * d_stride + f * f_stride], of which `depth` (up to 32) by
// `width` (up to 16) exist.
template <class Src>
struct PairBlock {
    const Src* p;
    int64_t d_stride, f_stride;
    int depth, width;
};

// v = [16 f][32 d], from a block that is contiguous along d.
template <class Src>
static inline void rows_along(const PairBlock<Src>& b, __m512i (&v)[16]) {
    for (int i = 0; i < 16; ++i)
        v[i] = i < b.width ? load32(b.p + i * b.f_stride, b.depth) : _mm512_setzero_si512();
}
// v = [pair of d][16 f][2], from a block that is contiguous along f.
template <class Src>
static inline void pairs_down(const PairBlock<Src>& b, __m512i (&v)[16]) {
    const auto row = [&](int d) {
        return d < b.depth ? load16(b.p + d * b.d_stride, b.width) : _mm256_setzero_si256();
    };
    for (int i = 0; i < 16; ++i)
        v[i] = interleave(row(2 * i), row(2 * i + 1));
}

// Brings one row of a tile of sums into the order of the columns. unpacklo and unpackhi, which made
// pairs of two rows of 32 columns, left columns 0-3, 8-11, 16-19 and 24-27 in one vector of sums,
// and the others in the next.
static inline void sort_columns(float* sums) {
    const __m512i first_half =
        _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second_half =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (float* p = sums; p < sums + kVectors * kLanes; p += 2 * kLanes) {
        const Vec low = load(p), high = load(p + kLanes);
        store(p, _mm512_permutex2var_ps(low, first_half, high));
        store(p + kLanes, _mm512_permutex2var_ps(low, second_half, high));
    }
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
    bf16 copy[16 * 32];
    for (int i = 0; i < b.width; ++i)
        for (int d = 0; d < b.depth; ++d)
            from_float(to_float(b.p[i * b.f_stride + d * b.d_stride]), copy + i * 32 + d);
    f(PairBlock<bf16>{copy, 1, 32, b.depth, b.width});
}

// v = [pair of d][16 f][2]
template <class Src>
static inline void by_pairs(const PairBlock<Src>& block, __m512i (&v)[16]) {
    with_contiguous(block, [&](const auto& b) {
        if (b.d_stride != 1)
            return pairs_down(b, v);
        rows_along(b, v);
        transpose16(v);
    });
}
// v = [16 f][32 d]
template <class Src>
static inline void by_rows(const PairBlock<Src>& block, __m512i (&v)[16]) {
    with_contiguous(block, [&](const auto& b) {
        if (b.d_stride == 1)
            return rows_along(b, v);
        pairs_down(b, v);
        transpose16(v);
    });
}

}  // namespace afa::cpu::AFA_ISA

#endif
