#pragma once

// Internal linkage on the host: the same header is compiled for several instruction sets, and the
// linker must not keep one copy of a function for all of them. A static member has no such linkage:
// code that is compiled for several instruction sets brings a class of its own (cpu/isa/math.h).
#if defined(__CUDACC__)
#define AFA_HOST_DEVICE __host__ __device__ __forceinline__
#define AFA_HOST_DEVICE_MEMBER static AFA_HOST_DEVICE
#else
#define AFA_HOST_DEVICE static inline
#define AFA_HOST_DEVICE_MEMBER static inline
#endif
