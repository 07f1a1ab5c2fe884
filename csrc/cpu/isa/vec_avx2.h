// Vec of vec.h in AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "cpu/isa/scalar.h"

#define AFA_VECTOR_REGISTERS 16

namespace afa::cpu::AFA_ISA {

using Vec = __m256;
constexpr int kLanes = 8;

static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec broadcast(float value) { return _mm256_set1_ps(value); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline Vec load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline Vec load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
// bfloat16 in the lower half of each lane, zeros in the upper one.
static inline __m256i round_bf16(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}
static inline __m128i narrow_f16(Vec v) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Two vectors, one behind the other.
template <class T>
static inline __m256i narrow2(Vec low, Vec high) {
    if constexpr (std::is_same_v<T, bf16>)
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(low), round_bf16(high)),
                                        0xD8);
    else
        return _mm256_inserti128_si256(_mm256_castsi128_si256(narrow_f16(low)), narrow_f16(high),
                                       1);
}
static inline void store(bf16* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_castsi256_si128(narrow2<bf16>(v, zero())));
}
static inline void store(f16* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(v));
}
static inline void add_sums(float* out, Vec a, Vec b, Vec c, Vec d) {
    const Vec ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const Vec cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const Vec quads = _mm256_castpd_ps(low) + _mm256_castpd_ps(high);
    const __m128 sums = _mm256_castps256_ps128(quads) + _mm256_extractf128_ps(quads, 1);
    _mm_storeu_ps(out, _mm_loadu_ps(out) + sums);
}

}  // namespace afa::cpu::AFA_ISA
