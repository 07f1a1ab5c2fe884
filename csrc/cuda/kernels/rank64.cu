#include "cuda/kernels/launch.cuh"

namespace afa {

const RankKernels& rank64_kernels(DType dtype) { return rank_kernels_of<64>(dtype); }

}  // namespace afa
