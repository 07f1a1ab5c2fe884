// Every primitive that the kernels use beyond plain C++: the only file with PTX or CUDA builtins.
//
// A kernel touches memory through these functions alone, and reaches every barrier and warp
// collective with all of its threads.
#pragma once

#include <cstdint>

#include "common/macros.h"

#define AFA_DEVICE __device__ __forceinline__
// Threads per block and, where ptxas would otherwise spill to make room for more, blocks per SM.
#define AFA_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define AFA_UNROLL _Pragma("unroll")
#define AFA_ROLLED _Pragma("unroll 1")

namespace afa {

// 16-bit storage types. Arithmetic is done in float; only conversions and mma see them.
struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

// 16 bytes, the widest access: eight 16-bit elements.
struct alignas(16) Vec16 {
    uint32_t word[4];
};

struct alignas(8) Float2 {
    float x, y;
};

struct alignas(16) Float4 {
    float x, y, z, w;
};

AFA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
AFA_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
AFA_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }

AFA_DEVICE void block_sync() { __syncthreads(); }
AFA_DEVICE void warp_sync() { __syncwarp(); }

// Every kernel begins with this. It may have been started while the kernel before it in the stream
// still ran (launch_kernel, device.cpp): waits until that one has ended and its memory is visible,
// then lets the kernel behind start in the same way. As each waits for the one before it, all
// kernels further back have ended too. Code for older architectures is never started early.
AFA_DEVICE void follow_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

AFA_DEVICE unsigned char* shared_array(int offset) {
    extern __shared__ __align__(16) unsigned char afa_shared[];
    return afa_shared + offset;
}

template <typename V>
AFA_DEVICE V load_global(const V* source) {
    __builtin_assume(__isGlobal(source));  // or a pointer chosen among several is one to anywhere
    return *source;
}
template <typename V>
AFA_DEVICE void store_global(V* target, const V& value) {
    __builtin_assume(__isGlobal(target));
    *target = value;
}

template <typename V>
AFA_DEVICE V load_shared(const void* source) {
    return *static_cast<const V*>(source);
}
template <typename V>
AFA_DEVICE void store_shared(void* target, const V& value) {
    *static_cast<V*>(target) = value;
}

AFA_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory, or writes 16 zero bytes where not `valid`. The
// bytes may be read after commit, wait and, by other threads, a barrier.
AFA_DEVICE void copy_async(void* target, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
                 "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}
AFA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are still under way.
template <int kPending>
AFA_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements; lane l points to row l % 8 of matrix l / 8.
AFA_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}
AFA_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16x8) += a (16x16) * b (16x8), float32 accumulators.
template <typename T>
AFA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
AFA_DEVICE void multiply_add<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
AFA_DEVICE void multiply_add<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even into one word, `low` in the lower half.
template <typename T>
AFA_DEVICE uint32_t pack(float low, float high);
template <>
AFA_DEVICE uint32_t pack<Bf16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <>
AFA_DEVICE uint32_t pack<Fp16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <typename T>
AFA_DEVICE Float2 unpack(uint32_t word);
template <>
AFA_DEVICE Float2 unpack<Bf16>(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
}
template <>
AFA_DEVICE Float2 unpack<Fp16>(uint32_t word) {
    Float2 pair;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(word));
    return pair;
}

AFA_DEVICE int lane_index() { return thread_index() & 31; }
AFA_DEVICE int warp_index() { return thread_index() >> 5; }

// Carves the block's dynamic shared memory; every thread takes the same arrays in the same order.
class SharedMemory {
  public:
    template <typename T>
    AFA_DEVICE T* take(int count) {
        T* array = reinterpret_cast<T*>(shared_array(offset_));
        offset_ += (count * static_cast<int>(sizeof(T)) + 15) & ~15;
        return array;
    }

  private:
    int offset_ = 0;
};

}  // namespace afa
