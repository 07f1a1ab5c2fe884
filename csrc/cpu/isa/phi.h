// phi and its slope over rows of z: the shared maths of common/activation.h, in loops that the
// compiler vectorises.
#pragma once

#include "common/activation.h"
#include "cpu/isa/math.h"

namespace afa::cpu::AFA_ISA {

template <Activation kAct>
static void phi_loop(const float* __restrict z, int64_t count, float alpha_t,
                     float* __restrict value, float* __restrict slope) {
    if (slope == nullptr) {
        for (int64_t i = 0; i < count; ++i)
            value[i] = anneal<kAct, VectorMath>(z[i], alpha_t).value;
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        const ValueSlope phi = anneal<kAct, VectorMath>(z[i], alpha_t);
        value[i] = phi.value;
        slope[i] = phi.slope;
    }
}

// value[i] = phi(z[i]) and, where wanted, slope[i] = phi'(z[i]). The arrays do not overlap.
template <int kId = 0>
static void phi(int activation, const float* z, int64_t count, float alpha_t, float* value,
                float* slope) {
    if constexpr (kId + 1 < kActivationCount) {
        if (activation != kId)
            return phi<kId + 1>(activation, z, count, alpha_t, value, slope);
    }
    phi_loop<static_cast<Activation>(kId)>(z, count, alpha_t, value, slope);
}

}  // namespace afa::cpu::AFA_ISA
