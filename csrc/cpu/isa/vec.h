// A vector of floats, Vec, in the instruction set that the including file is compiled for: loading
// and storing it as float32, bfloat16 or float16, and arithmetic.
//
// The including file defines AFA_ISA, the name of its namespace, and AFA_ISA_LEVEL: 0 (portable,
// SSE2 on x86-64), 1 (AVX2, FMA, F16C), 2 (AVX-512), 3 (AVX-512 with BF16) or 4 (that and AMX).
// Every function here is static. The linker merges equal inline functions of several files into
// one, and if it kept the one compiled for AVX-512, the program would crash on a machine without.
//
// AFA_EMULATE_BF16 puts plain AVX-512 code in the place of the BF16 instructions, so that a machine
// without them runs the kernels of levels 3 and 4 (for tests).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if AFA_ISA_LEVEL >= 1 || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/params.h"

#if AFA_ISA_LEVEL >= 3 && !defined(AFA_EMULATE_BF16)
#define AFA_BF16_INSTRUCTIONS 1
#else
#define AFA_BF16_INSTRUCTIONS 0
#endif

namespace afa::cpu::AFA_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

#if AFA_ISA_LEVEL >= 2
using Vec = __m512;
#elif AFA_ISA_LEVEL == 1
using Vec = __m256;
#else
typedef float Vec __attribute__((vector_size(16)));
#endif
constexpr int kLanes = sizeof(Vec) / sizeof(float);

template <class T>
static inline T min_of(T a, T b) {
    return a < b ? a : b;
}
template <class T>
static inline T max_of(T a, T b) {
    return a < b ? b : a;
}
static inline int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}
static inline int64_t round_down(int64_t value, int64_t multiple) {
    return value / multiple * multiple;
}
static inline int64_t ceil_div(int64_t value, int64_t divisor) {
    return (value + divisor - 1) / divisor;
}

// --- scalar conversions --------------------------------------------------------------------------

template <class To, class From>
static inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

static inline float to_float(float value) { return value; }
static inline float to_float(double value) { return static_cast<float>(value); }
static inline float to_float(bf16 value) {
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
static inline float to_float(f16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7FFFu;
    if (magnitude >= 0x7C00u)  // infinity or NaN
        return bit_cast<float>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
    // 2^112 moves the exponent bias from 15 to 127 and makes subnormal numbers normal on the way.
    const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
    return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
}

static inline void from_float(float value, float* out) { *out = value; }
static inline void from_float(float value, double* out) { *out = value; }
static inline void from_float(float value, bf16* out) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    out->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded >> 16);
}
static inline void from_float(float value, f16* out) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {  // 65520 and more round to infinity
        half = 0x7C00u;
    } else if (magnitude < 0x38800000u) {
        // The half is subnormal: adding 0.5 leaves its rounded bits in the lowest bits of the sum.
        half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
static inline float round_to(float value) {
    T narrow;
    from_float(value, &narrow);
    return to_float(narrow);
}

// a * b + c, rounded as the vectors of this instruction set round it: once if they have a fused
// multiply-add, else twice. So the scalar end of a loop has the bits of its vectors.
static inline float fma(float a, float b, float c) {
#if AFA_ISA_LEVEL >= 1
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// --- vectors -------------------------------------------------------------------------------------

#if AFA_ISA_LEVEL >= 2

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

#if AFA_ISA_LEVEL >= 3
// sum + a0 b0 + a1 b1 in each lane, where (a0, a1) and (b0, b1) are pairs of bfloat16: vdpbf16ps.
static inline Vec multiply_add_pairs(__m512i a, __m512i b, Vec sum) {
#if AFA_BF16_INSTRUCTIONS
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    const auto low = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    const auto high = [](__m512i v) {
        return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
    };
    return fma(high(a), high(b), fma(low(a), low(b), sum));
#endif
}
#endif

#else  // below AVX-512: tails go through a few stack bytes

#if AFA_ISA_LEVEL == 1

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

#else

static inline Vec zero() { return Vec{}; }
static inline Vec broadcast(float value) { return Vec{value, value, value, value}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof(v));
    return v;
}
template <class T>
static inline Vec load(const T* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
static inline void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }
template <class T>
static inline void store(T* p, Vec v) {
    for (int i = 0; i < kLanes; ++i)
        from_float(v[i], p + i);
}

#endif

template <class T>
static inline void store2(T* p, Vec low, Vec high) {
#if AFA_ISA_LEVEL == 1
    if constexpr (sizeof(T) < sizeof(float))
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow2<T>(low, high));
#endif
    store(p, low);
    store(p + kLanes, high);
}
template <class T>
static inline Vec load_first(const T* p, int count) {
    T lanes[kLanes] = {};
    memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}
template <class T>
static inline void store_first(T* p, Vec v, int count) {
    T lanes[kLanes];
    store(lanes, v);
    memcpy(p, lanes, count * sizeof(T));
}

#endif

// store2 past the cache, for results too large to stay in it: no line is read from memory before it
// is written. `p` is aligned to the bytes written. After such stores stream_fence() is due, before
// another thread reads the result.
static inline void stream2(float* p, Vec low, Vec high) {
#if AFA_ISA_LEVEL >= 2
    _mm512_stream_ps(p, low);
    _mm512_stream_ps(p + kLanes, high);
#elif AFA_ISA_LEVEL == 1
    _mm256_stream_ps(p, low);
    _mm256_stream_ps(p + kLanes, high);
#elif defined(__SSE2__)
    _mm_stream_ps(p, low);
    _mm_stream_ps(p + kLanes, high);
#else
    store2(p, low, high);
#endif
}
template <class T>
static inline void stream2(T* p, Vec low, Vec high) {
#if AFA_ISA_LEVEL >= 2
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow2<T>(low, high));
#elif AFA_ISA_LEVEL == 1
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow2<T>(low, high));
#elif defined(__SSE2__)
    alignas(16) T narrow[2 * kLanes];
    store2(narrow, low, high);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(narrow)));
#else
    store2(p, low, high);
#endif
}
static inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// out[0..3] += the sums over the lanes of a, b, c, d.
static inline void add_sums(float* out, Vec a, Vec b, Vec c, Vec d) {
#if AFA_ISA_LEVEL >= 2
    const Vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const Vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const Vec quads = _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
    const __m256 half = _mm512_castps512_ps256(quads) + _mm512_extractf32x8_ps(quads, 1);
    const __m128 sums = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
    _mm_storeu_ps(out, _mm_loadu_ps(out) + sums);
#elif AFA_ISA_LEVEL == 1
    const Vec ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const Vec cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const Vec quads = _mm256_castpd_ps(low) + _mm256_castpd_ps(high);
    const __m128 sums = _mm256_castps256_ps128(quads) + _mm256_extractf128_ps(quads, 1);
    _mm_storeu_ps(out, _mm_loadu_ps(out) + sums);
#else
    const Vec sums{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]),
                   (c[0] + c[2]) + (c[1] + c[3]), (d[0] + d[2]) + (d[1] + d[3])};
    store(out, load(out) + sums);
#endif
}

}  // namespace afa::cpu::AFA_ISA
