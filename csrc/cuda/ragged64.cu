#include "cuda/ragged_launch.cuh"

namespace afa {

const RaggedKernels& ragged64_kernels(DType dtype) { return ragged_kernels_of<64>(dtype); }

}  // namespace afa
