// Vec of vec.h in NEON, with the BF16 conversion at AFA_NEON_LEVEL 2.
#pragma once

#include <arm_neon.h>

#include "cpu/isa/scalar.h"

#define AFA_VECTOR_REGISTERS 32

namespace afa::cpu::AFA_ISA {

using Vec = float32x4_t;
constexpr int kLanes = 4;

static inline Vec zero() { return vdupq_n_f32(0.0f); }
static inline Vec broadcast(float value) { return vdupq_n_f32(value); }
static inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }

static inline Vec load(const float* p) { return vld1q_f32(p); }
static inline Vec load(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
static inline Vec load(const f16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}

static inline uint16x4_t narrow_bf16(Vec v) {
#if AFA_NEON_LEVEL >= 2
    return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
#else
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
#endif
}
static inline void store(float* p, Vec v) { vst1q_f32(p, v); }
static inline void store(bf16* p, Vec v) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), narrow_bf16(v));
}
static inline void store(f16* p, Vec v) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}

static inline void add_sums(float* out, Vec a, Vec b, Vec c, Vec d) {
    store(out, load(out) + vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

}  // namespace afa::cpu::AFA_ISA
