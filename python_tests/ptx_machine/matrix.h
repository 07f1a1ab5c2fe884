// What mma and wgmma share: element types, the fragment of A, and the order of the sums.
#pragma once

#include <cmath>

#include "ptx_machine/half.h"
#include "ptx_machine/state.h"

namespace ptx {

enum class Element { bf16, f16, tf32 };

// Elements of k that one instruction sums over.
constexpr int depth_of(Element e) { return e == Element::tf32 ? 8 : 16; }

template <Element kElement>
float to_float(uint32_t bits) {
    return kElement == Element::bf16  ? bf16_to_float(bits)
           : kElement == Element::f16 ? f16_to_float(bits)
                                      : tf32_to_float(bits);
}

inline void require_whole_warp(const Warp& warp) {
    if (warp.active != kAllLanes)
        throw Fault{__builtin_ctz(~warp.active),
                    "an instruction of the whole warp, of which this lane has returned"};
}

template <Element kElement>
void read_fragment_a(const Warp& warp, const uint32_t (&places)[4],
                     float (&a)[16][depth_of(kElement)]) {
    for (int i = 0; i < 4; ++i) {
        const uint32_t* from = warp.in<uint32_t>(places[i]);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int row = lane / 4 + 8 * (i % 2), q = lane % 4;
            if constexpr (kElement == Element::tf32) {
                a[row][q + 4 * (i / 2)] = tf32_to_float(from[lane]);
            } else {
                a[row][2 * q + 8 * (i / 2)] = to_float<kElement>(from[lane] & 0xFFFF);
                a[row][2 * q + 8 * (i / 2) + 1] = to_float<kElement>(from[lane] >> 16);
            }
        }
    }
}

// In float32 and in the order of k. Products of these types are exact in
// float32, so that it makes no difference whether they are fused.
template <int kK, int kColumns>
void accumulate(const float (&a)[16][kK], const float (&b)[kK][kColumns],
                float (&sum)[16][kColumns]) {
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < kK; ++k) {
            const float factor = a[row][k];
            for (int column = 0; column < kColumns; ++column) {
#if defined(__FMA__)
                sum[row][column] = std::fma(factor, b[k][column], sum[row][column]);
#else
                sum[row][column] += factor * b[k][column];
#endif
            }
        }
    }
}

}  // namespace ptx
