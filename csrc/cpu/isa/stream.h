// Stores past the cache, for results too large to stay in it: no line is read from memory before it
// is written.
#pragma once

#if AFA_ISA_LEVEL >= 1 || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/isa/vec.h"

namespace afa::cpu::AFA_ISA {

// store2 past the cache, where the processor can be asked for that. `p` is aligned to the bytes
// written. After such stores stream_fence() is due, before another thread reads the result.
static inline void stream2(float* p, Vec low, Vec high) {
#if AFA_ISA_LEVEL >= 2
    _mm512_stream_ps(p, low);
    _mm512_stream_ps(p + kLanes, high);
#elif AFA_ISA_LEVEL == 1
    _mm256_stream_ps(p, low);
    _mm256_stream_ps(p + kLanes, high);
#elif defined(__SSE2__)
    _mm_stream_ps(p, low);
    _mm_stream_ps(p + kLanes, high);
#else
    store2(p, low, high);
#endif
}
template <class T>
static inline void stream2(T* p, Vec low, Vec high) {
#if AFA_ISA_LEVEL >= 2
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow2<T>(low, high));
#elif AFA_ISA_LEVEL == 1
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow2<T>(low, high));
#elif defined(__SSE2__)
    alignas(16) T narrow[2 * kLanes];
    store2(narrow, low, high);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(narrow)));
#else
    store2(p, low, high);
#endif
}
static inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace afa::cpu::AFA_ISA
