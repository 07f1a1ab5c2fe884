// The kernels, compiled for the emulator: every .cu file that instantiates some is plain C++
// without nvcc.
#include "cuda/kernels/prim_check.cu"
#include "cuda/kernels/rank16.cu"
#include "cuda/kernels/rank32.cu"
#include "cuda/kernels/rank64.cu"
#include "cuda/kernels/small.cu"
