// Elements of 16 and 32 bits one at a time, and the arithmetic of sizes.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/params.h"

namespace afa::cpu::AFA_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

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
#if AFA_ISA_LEVEL >= 1 || AFA_NEON_LEVEL >= 1
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

}  // namespace afa::cpu::AFA_ISA
