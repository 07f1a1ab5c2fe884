#pragma once

#if defined(__CUDACC__)
#define AFA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define AFA_HOST_DEVICE inline
#endif
