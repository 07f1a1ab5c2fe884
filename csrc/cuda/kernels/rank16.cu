#include "cuda/kernels/launch.cuh"

namespace afa {

const RankKernels& rank16_kernels(DType dtype) { return rank_kernels_of<16>(dtype); }

}  // namespace afa
