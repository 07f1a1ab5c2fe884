#include "cuda/ragged_launch.cuh"

namespace afa {

const RaggedKernels& ragged16_kernels(DType dtype) { return ragged_kernels_of<16>(dtype); }

}  // namespace afa
