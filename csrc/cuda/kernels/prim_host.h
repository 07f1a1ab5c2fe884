// Host bodies of the primitives (see prim.cuh), on the SIMT emulator; prim_device.cuh has their
// twins.
#pragma once

#include "emulator/simt.h"

#define AFA_DEVICE inline
#define AFA_KERNEL(...) void
#define AFA_UNROLL
#define AFA_ROLLED
// The line of the kernel, for messages.
#define AFA_SITE simt::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace afa {

template <typename T>
constexpr simt::Format kFormat = simt::Format::bf16;
template <>
constexpr simt::Format kFormat<Fp16> = simt::Format::fp16;

inline int thread_index() { return simt::thread_index(); }
inline int block_x() { return simt::block_x(); }
inline int block_y() { return simt::block_y(); }

inline void block_sync(AFA_SITE) { simt::block_sync(site); }
inline void warp_sync(AFA_SITE) { simt::warp_sync(site); }

inline void follow_previous_kernel() {}  // the emulator runs one kernel at a time

inline unsigned char* shared_array(int offset, int bytes, AFA_SITE) {
    return simt::shared_array(offset, bytes, site);
}

template <typename V>
V load_global(const V* source, AFA_SITE) {
    simt::check_global(source, sizeof(V), false, site);
    return *source;
}
template <typename V>
void store_global(V* target, const V& value, AFA_SITE) {
    simt::check_global(target, sizeof(V), true, site);
    *target = value;
}

template <typename V>
V load_shared(const void* source, AFA_SITE) {
    simt::check_shared(source, sizeof(V), site);
    return *static_cast<const V*>(source);
}
template <typename V>
void store_shared(void* target, const V& value, AFA_SITE) {
    simt::check_shared(target, sizeof(V), site);
    *static_cast<V*>(target) = value;
}

inline void copy_async(void* target, const void* source, bool valid, AFA_SITE) {
    simt::copy_async(target, source, valid, site);
}
inline void copy_commit() { simt::copy_commit(); }
template <int kPending>
void copy_wait(AFA_SITE) {
    simt::copy_wait(kPending, site);
}

inline void load_matrices(uint32_t (&m)[4], const void* row, AFA_SITE) {
    simt::load_matrices(m, row, false, site);
}
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row, AFA_SITE) {
    simt::load_matrices(m, row, true, site);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, AFA_SITE) {
    simt::multiply_add(c, a, b0, b1, kFormat<T>, site);
}

template <typename T>
uint32_t pack(float low, float high) {
    return simt::from_float(low, kFormat<T>) |
           static_cast<uint32_t>(simt::from_float(high, kFormat<T>)) << 16;
}
template <typename T>
Float2 unpack(uint32_t word) {
    return {simt::to_float(static_cast<uint16_t>(word), kFormat<T>),
            simt::to_float(static_cast<uint16_t>(word >> 16), kFormat<T>)};
}

}  // namespace afa
