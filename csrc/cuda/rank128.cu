#include "cuda/launch.cuh"

namespace afa {

const RankKernels& rank128_kernels(DType dtype) { return rank_kernels_of<128>(dtype); }

}  // namespace afa
