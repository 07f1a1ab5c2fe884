// exp, erf and tanh as straight lines of float arithmetic: the C library's have branches and calls,
// which keep a loop from being vectorised.
//
// Errors: exp 1e-7 relative; the normal distribution function 1e-7 absolute; tanh 1e-7 absolute,
// 2e-7 relative.
#pragma once

#include <cmath>

#include "cpu/isa/vec.h"

// One call that is left in a loop keeps all of it from being vectorised.
#define AFA_ALWAYS_INLINE inline __attribute__((always_inline))

namespace afa::cpu::AFA_ISA {

struct VectorMath {
    static AFA_ALWAYS_INLINE float exp(float x) {
        // NaN passes both comparisons. Beyond the limits the result is 0 or infinity.
        float t = x < -104.0f ? -104.0f : x;
        t = t > 89.0f ? 89.0f : t;
        // e^t = 2^n e^rest; adding 1.5 * 2^23 leaves n in the low bits.
        constexpr float kRound = 12582912.0f;
        const float shifted = fma(t, 1.44269504088896341f, kRound);
        const int32_t n = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound);
        const float whole = shifted - kRound;
        const float rest = fma(whole, -1.42860677e-6f, fma(whole, -0.693145752f, t));
        float p = 1.98412698e-4f;
        p = fma(p, rest, 1.38888889e-3f);
        p = fma(p, rest, 8.33333333e-3f);
        p = fma(p, rest, 4.16666667e-2f);
        p = fma(p, rest, 1.66666667e-1f);
        p = fma(p, rest, 0.5f);
        p = fma(p, rest, 1.0f);
        p = fma(p, rest, 1.0f);
        // In two steps, since 2^n alone may lie outside of what a float holds.
        const int32_t half = n >> 1;
        return p * power_of_two(half) * power_of_two(n - half);
    }

    // Phi(z) = erfc(-z / sqrt 2) / 2. With t = 1 / (1 + 0.41 |z| / sqrt 2), erfc(x) e^(x^2) is a
    // polynomial in t to 1e-9, fitted by weighted least squares; `gauss` is exp(-z^2 / 2).
    static AFA_ALWAYS_INLINE float normal_cdf(float z, float gauss) {
        const float t = 1.0f / fma(z < 0.0f ? -z : z, 0.41f * 0.70710678118654752440f, 1.0f);
        float p = 0.07240717113018036f;
        p = fma(p, t, -0.35341426730155945f);
        p = fma(p, t, 0.5416940450668335f);
        p = fma(p, t, -0.21692581474781036f);
        p = fma(p, t, 0.309932678937912f);
        p = fma(p, t, 0.18005859851837158f);
        p = fma(p, t, 0.23509813845157623f);
        p = fma(p, t, 0.23114947974681854f);
        const float tail = 0.5f * gauss * (p * t);
        // Around 0, where that product rounds more often, by Taylor's series.
        const float square = z * z;
        float q = -4.12266741e-08f;
        q = fma(q, square, 6.65969352e-07f);
        q = fma(q, square, -9.44465626e-06f);
        q = fma(q, square, 0.000115434688f);
        q = fma(q, square, -0.00118732822f);
        q = fma(q, square, 0.00997355701f);
        q = fma(q, square, -0.0664903801f);
        q = fma(q, square, 0.39894228f);
        const float near = fma(q, z, 0.5f), far = z > 0.0f ? 1.0f - tail : tail;
        return square < 1.0f ? near : far;
    }

    static AFA_ALWAYS_INLINE float tanh(float x) {
        // By Taylor's series where 1 - 2 / (e^2x + 1) would cancel.
        const float square = x * x;
        float p = -8.86323552e-3f;
        p = fma(p, square, 2.18694885e-2f);
        p = fma(p, square, -5.39682540e-2f);
        p = fma(p, square, 1.33333333e-1f);
        p = fma(p, square, -3.33333333e-1f);
        const float near = fma(p * square, x, x);
        // By the size of x: at the negative end 1 - 2 / (0 + 1) would round twice.
        const float size = 1.0f - 2.0f / (exp(2.0f * (x < 0.0f ? -x : x)) + 1.0f);
        const float far = x < 0.0f ? -size : size;
        return square < 0.1f ? near : far;
    }

    static AFA_ALWAYS_INLINE float sin(float x) { return sinf(x); }
    static AFA_ALWAYS_INLINE float cos(float x) { return cosf(x); }

  private:
    static AFA_ALWAYS_INLINE float power_of_two(int32_t n) {
        return bit_cast<float>(static_cast<uint32_t>(n + 127) << 23);
    }
};

}  // namespace afa::cpu::AFA_ISA
