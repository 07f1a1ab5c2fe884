// The kernels, compiled for the emulator: every .cu file that instantiates some is plain C++
// without nvcc.
#include "cuda/prim_check.cu"
#include "cuda/rank16.cu"
#include "cuda/rank32.cu"
#include "cuda/rank64.cu"
#include "cuda/small.cu"
