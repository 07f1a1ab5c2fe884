// The pairs of pairs.h in NEON with BF16.
#pragma once

#include "cpu/isa/vec.h"

namespace afa::cpu::AFA_ISA {

using Pairs = uint16x8_t;
using Singles = uint16x4_t;
constexpr int kPairLanes = 2 * kLanes;

static inline Pairs zero_pairs() { return vdupq_n_u16(0); }
static inline Singles zero_singles() { return vdup_n_u16(0); }
static inline Pairs load_pairs(const bf16* p) {
    return vld1q_u16(reinterpret_cast<const uint16_t*>(p));
}
static inline void store_pairs(bf16* p, Pairs v) { vst1q_u16(reinterpret_cast<uint16_t*>(p), v); }
static inline Pairs broadcast_pair(const bf16* p) {
    uint32_t both;
    memcpy(&both, p, sizeof(both));
    return vreinterpretq_u16_u32(vdupq_n_u32(both));
}

static inline Singles load_singles(const bf16* p, int count) {
    bf16 elements[kLanes] = {};
    memcpy(elements, p, count * sizeof(bf16));
    return vld1_u16(reinterpret_cast<const uint16_t*>(elements));
}
static inline Singles load_singles(const float* p, int count) {
    return narrow_bf16(load_first(p, count));
}
static inline Pairs load_pairs(const bf16* p, int count) {
    bf16 elements[kPairLanes] = {};
    memcpy(elements, p, count * sizeof(bf16));
    return load_pairs(elements);
}
static inline Pairs load_pairs(const float* p, int count) {
    const Vec low = load_first(p, min_of(count, kLanes));
    const Vec high = count > kLanes ? load_first(p + kLanes, count - kLanes) : zero();
    return vcombine_u16(narrow_bf16(low), narrow_bf16(high));
}

static inline Vec multiply_add_pairs(Pairs a, Pairs b, Vec sum) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b));
}

static inline Pairs interleave(Singles even, Singles odd) {
    return vcombine_u16(vzip1_u16(even, odd), vzip2_u16(even, odd));
}

static inline void transpose(Pairs (&rows)[kLanes]) {
    const auto lanes = [](Pairs v) { return vreinterpretq_u32_u16(v); };
    const auto halves = [](uint32x4_t v) { return vreinterpretq_u64_u32(v); };
    const auto pairs = [](uint64x2_t v) { return vreinterpretq_u16_u64(v); };
    const uint64x2_t even01 = halves(vtrn1q_u32(lanes(rows[0]), lanes(rows[1])));
    const uint64x2_t odd01 = halves(vtrn2q_u32(lanes(rows[0]), lanes(rows[1])));
    const uint64x2_t even23 = halves(vtrn1q_u32(lanes(rows[2]), lanes(rows[3])));
    const uint64x2_t odd23 = halves(vtrn2q_u32(lanes(rows[2]), lanes(rows[3])));
    rows[0] = pairs(vtrn1q_u64(even01, even23));
    rows[1] = pairs(vtrn1q_u64(odd01, odd23));
    rows[2] = pairs(vtrn2q_u64(even01, even23));
    rows[3] = pairs(vtrn2q_u64(odd01, odd23));
}

// Zipping two rows keeps the order of the columns.
static inline void store_row_pairs(bf16* p, Pairs row0, Pairs row1) {
    store_pairs(p, vzip1q_u16(row0, row1));
    store_pairs(p + kPairLanes, vzip2q_u16(row0, row1));
}
static inline void sort_columns(float*) {}

}  // namespace afa::cpu::AFA_ISA
