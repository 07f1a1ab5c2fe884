// The pairs of pairs.h in AVX-512.
#pragma once

#include "cpu/isa/target.h"

namespace afa::cpu::AFA_ISA {

using Pairs = __m512i;
using Singles = __m256i;
constexpr int kPairLanes = 2 * kLanes;

static inline Pairs zero_pairs() { return _mm512_setzero_si512(); }
static inline Singles zero_singles() { return _mm256_setzero_si256(); }
static inline Pairs load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
static inline void store_pairs(bf16* p, Pairs v) { _mm512_storeu_si512(p, v); }
static inline Pairs broadcast_pair(const bf16* p) {
    int32_t both;
    memcpy(&both, p, sizeof(both));
    return _mm512_set1_epi32(both);
}

static inline Singles load_singles(const bf16* p, int count) {
    return _mm256_maskz_loadu_epi16(first(count), p);
}
static inline Singles load_singles(const float* p, int count) {
    return narrow_bf16(load_first(p, count));
}
static inline Pairs load_pairs(const bf16* p, int count) {
    return _mm512_maskz_loadu_epi16(count < 32 ? (uint32_t{1} << count) - 1 : ~uint32_t{0}, p);
}
static inline Pairs load_pairs(const float* p, int count) {
    const Vec low = load_first(p, min_of(count, kLanes));
    return narrow2<bf16>(low, count > kLanes ? load_first(p + kLanes, count - kLanes) : zero());
}

static inline Vec multiply_add_pairs(Pairs a, Pairs b, Vec sum) {
#if AFA_BF16_INSTRUCTIONS
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    const auto low = [](Pairs v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    const auto high = [](Pairs v) {
        return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
    };
    return fma(high(a), high(b), fma(low(a), low(b), sum));
#endif
}

static inline Pairs interleave(Singles even, Singles odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// A call would send all rows through memory.
static inline __attribute__((always_inline)) void transpose(Pairs (&rows)[kLanes]) {
    Pairs t[kLanes];
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

// Unpacking two rows of 32 columns leaves columns 0-3, 8-11, 16-19 and 24-27 in one vector of
// pairs, and so of sums, and the others in the next.
static inline void store_row_pairs(bf16* p, Pairs row0, Pairs row1) {
    store_pairs(p, _mm512_unpacklo_epi16(row0, row1));
    store_pairs(p + kPairLanes, _mm512_unpackhi_epi16(row0, row1));
}
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

}  // namespace afa::cpu::AFA_ISA
