// The activation maths of every compiled backend: value and slope, float in, float out.
//
//   phi(z) = (1 - alpha_t) * z + alpha_t * act(z)
//   phi'(z) = (1 - alpha_t) + alpha_t * act'(z)
//
// To add an activation, write its name at the end of AFA_ACTIVATIONS and its formula into
// activate(). The bindings, the CPU and CUDA kernels and their drivers follow from these two. Its
// id is its place in the list, and stands in afa_kernels/operator/activation.py too (a test
// compares the two).
//
// Conventions at kinks are torch's: relu'(0) = 0.
//
// `identity` is that of a call whose alpha_t is known to be 0: phi(z) = z, and alpha_t, which may
// be a null pointer then, is not read.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace afa {

#define AFA_ACTIVATIONS(ROW)                                                                       \
    ROW(identity)                                                                                  \
    ROW(relu)                                                                                      \
    ROW(silu)                                                                                      \
    ROW(gelu)                                                                                      \
    ROW(gelu_tanh)                                                                                 \
    ROW(leaky_relu)                                                                                \
    ROW(tanh)                                                                                      \
    ROW(sin)

#define AFA_ENUMERATOR(name) name,
enum class Activation : int { AFA_ACTIVATIONS(AFA_ENUMERATOR) };
#undef AFA_ENUMERATOR

// The names of the activations by their ids.
#define AFA_NAME(name) #name,
constexpr const char* kActivationNames[] = {AFA_ACTIVATIONS(AFA_NAME)};
#undef AFA_NAME
constexpr int kActivationCount = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

struct ValueSlope {
    float value;
    float slope;
};

// The functions that the activations are made of, by the C library or CUDA's.
struct LibraryMath {
    AFA_HOST_DEVICE_MEMBER float exp(float x) { return expf(x); }
    AFA_HOST_DEVICE_MEMBER float tanh(float x) { return tanhf(x); }
    AFA_HOST_DEVICE_MEMBER float sin(float x) { return sinf(x); }
    AFA_HOST_DEVICE_MEMBER float cos(float x) { return cosf(x); }
    // The normal distribution function; `gauss` is exp(-z^2 / 2).
    AFA_HOST_DEVICE_MEMBER float normal_cdf(float z, float) {
        return 0.5f * (1.0f + erff(z * 0.70710678118654752440f));
    }
};

// act(z) and act'(z) together, since they share their expensive part; an unused half is removed by
// the compiler.
template <Activation kAct, class Math = LibraryMath>
AFA_HOST_DEVICE ValueSlope activate(float z) {
    if constexpr (kAct == Activation::identity) {
        return {z, 1.0f};
    } else if constexpr (kAct == Activation::relu) {
        return {z > 0.0f ? z : 0.0f, z > 0.0f ? 1.0f : 0.0f};
    } else if constexpr (kAct == Activation::silu) {
        const float sigmoid = 1.0f / (1.0f + Math::exp(-z));
        return {z * sigmoid, sigmoid * (1.0f + z * (1.0f - sigmoid))};
    } else if constexpr (kAct == Activation::gelu) {
        const float gauss = Math::exp(-0.5f * z * z);
        const float cdf = Math::normal_cdf(z, gauss);
        return {z * cdf, cdf + z * 0.39894228040143267794f * gauss};
    } else if constexpr (kAct == Activation::gelu_tanh) {
        constexpr float kSqrt2OverPi = 0.79788456080286535588f, kCubic = 0.044715f;
        const float t = Math::tanh(kSqrt2OverPi * (z + kCubic * z * z * z));
        return {0.5f * z * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) *
                                                               kSqrt2OverPi *
                                                               (1.0f + 3.0f * kCubic * z * z)};
    } else if constexpr (kAct == Activation::leaky_relu) {
        return {z > 0.0f ? z : 0.01f * z, z > 0.0f ? 1.0f : 0.01f};
    } else if constexpr (kAct == Activation::tanh) {
        const float t = Math::tanh(z);
        return {t, 1.0f - t * t};
    } else {
        static_assert(kAct == Activation::sin, "an activation has no case in activate()");
        return {Math::sin(z), Math::cos(z)};
    }
}

// phi(z) and phi'(z).
template <Activation kAct, class Math = LibraryMath>
AFA_HOST_DEVICE ValueSlope anneal(float z, float alpha_t) {
    const ValueSlope act = activate<kAct, Math>(z);
    if constexpr (kAct == Activation::identity)
        return act;
    return {(1.0f - alpha_t) * z + alpha_t * act.value, (1.0f - alpha_t) + alpha_t * act.slope};
}

// The same for an id that is known at run time only. On a GPU all threads of a warp have the same
// id, so the branch costs little.
template <int kId = 0>
AFA_HOST_DEVICE ValueSlope anneal_by_id(int activation, float z, float alpha_t) {
    if constexpr (kId + 1 < kActivationCount) {
        if (activation != kId)
            return anneal_by_id<kId + 1>(activation, z, alpha_t);
    }
    return anneal<static_cast<Activation>(kId)>(z, alpha_t);
}

}  // namespace afa
