// Vec of vec.h in the vector types of GCC and Clang, for any processor.
#pragma once

#include "cpu/isa/scalar.h"

#define AFA_VECTOR_REGISTERS 16

namespace afa::cpu::AFA_ISA {

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4;

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
static inline void add_sums(float* out, Vec a, Vec b, Vec c, Vec d) {
    const Vec sums{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]),
                   (c[0] + c[2]) + (c[1] + c[3]), (d[0] + d[2]) + (d[1] + d[3])};
    store(out, load(out) + sums);
}

}  // namespace afa::cpu::AFA_ISA
