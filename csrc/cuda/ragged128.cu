#include "cuda/ragged_launch.cuh"

namespace afa {

const RaggedKernels& ragged128_kernels(DType dtype) { return ragged_kernels_of<128>(dtype); }

}  // namespace afa
