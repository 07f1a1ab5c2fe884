#include "cuda/kernels/launch.cuh"

namespace afa {

const RankKernels& rank32_kernels(DType dtype) { return rank_kernels_of<32>(dtype); }

}  // namespace afa
