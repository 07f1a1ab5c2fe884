// Vec of vec.h in AVX-512, with the BF16 instructions from AFA_ISA_LEVEL 3 on.
//
// AFA_EMULATE_BF16 puts plain AVX-512 code in the place of the BF16 instructions, so that a machine
// without them runs the kernels of levels 3 and 4 (for tests).
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "cpu/isa/scalar.h"

#define AFA_VECTOR_REGISTERS 32

#if AFA_ISA_LEVEL >= 3 && !defined(AFA_EMULATE_BF16)
#define AFA_BF16_INSTRUCTIONS 1
#else
#define AFA_BF16_INSTRUCTIONS 0
#endif

namespace afa::cpu::AFA_ISA {

using Vec = __m512;
constexpr int kLanes = 16;

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline Vec load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline Vec load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline Vec load_first(const float* p, int count) {
    return _mm512_maskz_loadu_ps(first(count), p);
}
static inline Vec load_first(const bf16* p, int count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline Vec load_first(const f16* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
}

static inline __m256i narrow_bf16(Vec v) {
#if AFA_BF16_INSTRUCTIONS
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
static inline __m256i narrow_f16(Vec v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline void store(bf16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
}
static inline void store(f16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v));
}
// Two vectors, one behind the other.
template <class T>
static inline __m512i narrow2(Vec low, Vec high) {
#if AFA_BF16_INSTRUCTIONS
    if constexpr (std::is_same_v<T, bf16>)
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#endif
    const auto narrow = [](Vec v) {
        if constexpr (std::is_same_v<T, bf16>)
            return narrow_bf16(v);
        else
            return narrow_f16(v);
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
}
static inline void store2(float* p, Vec low, Vec high) {
    store(p, low);
    store(p + kLanes, high);
}
template <class T>
static inline void store2(T* p, Vec low, Vec high) {
    _mm512_storeu_si512(p, narrow2<T>(low, high));
}
static inline void store_first(float* p, Vec v, int count) {
    _mm512_mask_storeu_ps(p, first(count), v);
}
static inline void store_first(bf16* p, Vec v, int count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow_bf16(v));
}
static inline void store_first(f16* p, Vec v, int count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow_f16(v));
}

static inline void add_sums(float* out, Vec a, Vec b, Vec c, Vec d) {
    const Vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const Vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const Vec quads = _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
    const __m256 half = _mm512_castps512_ps256(quads) + _mm512_extractf32x8_ps(quads, 1);
    const __m128 sums = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
    _mm_storeu_ps(out, _mm_loadu_ps(out) + sums);
}

}  // namespace afa::cpu::AFA_ISA
