// 16-bit floating-point formats, and float32 as the tensor cores' tf32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ptx {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float bf16_to_float(uint32_t bits) { return float_of(bits << 16); }

// To nearest even; every NaN becomes the one that hardware gives.
inline uint32_t float_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline float f16_to_float(uint32_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(static_cast<uint16_t>(bits));
#else
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023, sign = (bits & 0x8000) << 16;
    if (exponent == 31)
        return float_of(sign | 0x7F800000 | fraction << 13);
    if (exponent == 0)
        return float_of(sign | bits_of(std::ldexp(static_cast<float>(fraction), -24)));
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

inline uint32_t float_to_f16(float value) {
    if (value != value)
        return 0x7FFF;
#if defined(__F16C__)
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t sign = bits_of(value) >> 16 & 0x8000;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f)  // rounds to 2^16
        return sign | 0x7C00;
    if (magnitude == 0.0f)
        return sign;
    int exponent;
    std::frexp(magnitude, &exponent);
    // The spacing of halves around the value; below 2^-14 it stays that of the subnormals. A carry
    // into the next exponent comes out right, since the encoding is monotonic.
    const int ulp = (exponent < -13 ? -13 : exponent) - 11;
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -ulp)));
    return sign | static_cast<uint32_t>(steps + (ulp + 24) * 1024);
#endif
}

// A tensor core reads the upper 19 bits of a float32 operand.
inline float tf32_to_float(uint32_t bits) { return float_of(bits & 0xFFFFE000u); }

}  // namespace ptx
