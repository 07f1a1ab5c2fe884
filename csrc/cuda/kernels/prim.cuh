// Every primitive that the kernels use beyond plain C++: the only file with PTX or CUDA builtins.
//
// nvcc compiles the device bodies; any other compiler gets host bodies that run on the SIMT
// emulator (csrc/emulator), so that the same kernel source executes on a CPU. A kernel includes
// this file alone, touches memory through these functions alone, and reaches every barrier and warp
// collective with all of its threads.
#pragma once

#include <cstdint>

#include "common/macros.h"

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

}  // namespace afa

#if defined(__CUDACC__)
#include "cuda/kernels/prim_device.cuh"
#else
#include "cuda/kernels/prim_host.h"
#endif

namespace afa {

AFA_DEVICE int lane_index() { return thread_index() & 31; }
AFA_DEVICE int warp_index() { return thread_index() >> 5; }

// Carves the block's dynamic shared memory; every thread takes the same arrays in the same order.
class SharedMemory {
  public:
    template <typename T>
    AFA_DEVICE T* take(int count) {
        const int bytes = (count * static_cast<int>(sizeof(T)) + 15) & ~15;
        T* array = reinterpret_cast<T*>(shared_array(offset_, bytes));
        offset_ += bytes;
        return array;
    }

  private:
    int offset_ = 0;
};

}  // namespace afa
