// A vector of floats, Vec, in the instruction set that the including file is compiled for.
//
// The including file defines AFA_ISA, the name of its namespace, and one of
//   AFA_ISA_LEVEL    of x86-64: 1 (AVX2, FMA, F16C), 2 (AVX-512), 3 (AVX-512 with BF16) or 4 (that
//                    and AMX); 0 anywhere: portable, SSE2 on x86-64
//   AFA_NEON_LEVEL   of aarch64: 1 (NEON of ARMv8-A) or 2 (that with BF16)
// Every function here is static. The linker merges equal inline functions of several files into
// one, and if it kept the one compiled for AVX-512, the program would crash on a machine without.
//
// Each vec_*.h defines, for T float, bf16 and f16,
//   Vec, kLanes, AFA_VECTOR_REGISTERS
//   zero(), broadcast(value), fma(a, b, c); + - * are the compiler's
//   load(const T*), store(T*, Vec)   widen to float32, and round to T
//   add_sums(out, a, b, c, d)        out[0..3] += the sums over the lanes of a, b, c, d
// What takes two vectors or a part of one, store2, load_first and store_first, stands below, but
// for AVX-512, which has instructions for it.
#pragma once

#if AFA_NEON_LEVEL >= 1
#include "cpu/isa/vec_neon.h"
#elif AFA_ISA_LEVEL >= 2
#include "cpu/isa/vec_avx512.h"
#elif AFA_ISA_LEVEL == 1
#include "cpu/isa/vec_avx2.h"
#else
#include "cpu/isa/vec_portable.h"
#endif

// Instructions that multiply pairs of bfloat16 (pairs.h).
#define AFA_BF16_PAIRS (AFA_ISA_LEVEL >= 3 || AFA_NEON_LEVEL >= 2)

#if AFA_ISA_LEVEL < 2

namespace afa::cpu::AFA_ISA {

// Two vectors, one behind the other.
template <class T>
static inline void store2(T* p, Vec low, Vec high) {
#if AFA_ISA_LEVEL == 1
    if constexpr (sizeof(T) < sizeof(float))
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow2<T>(low, high));
#endif
    store(p, low);
    store(p + kLanes, high);
}
// The first `count` lanes, and zeros behind them: through a few stack bytes.
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

}  // namespace afa::cpu::AFA_ISA

#endif
