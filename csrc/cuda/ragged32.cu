#include "cuda/ragged_launch.cuh"

namespace afa {

const RaggedKernels& ragged32_kernels(DType dtype) { return ragged_kernels_of<32>(dtype); }

}  // namespace afa
