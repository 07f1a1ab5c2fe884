// The kernels without a rank class.
#include "cuda/kernels/launch.cuh"

namespace afa {

void launch_pack(DType dtype, const LaunchConfig& config, const PackParams& params) {
    if (dtype == DType::bf16)
        launch<pack_kernel<Bf16>>(config, params);
    else
        launch<pack_kernel<Fp16>>(config, params);
}

void launch_reduce(DType dtype, const LaunchConfig& config, const ReduceParams& params) {
    if (dtype == DType::bf16)
        launch<reduce_kernel<Bf16>>(config, params);
    else
        launch<reduce_kernel<Fp16>>(config, params);
}

const void* any_kernel() { return reinterpret_cast<const void*>(reduce_kernel<Bf16>); }

}  // namespace afa
