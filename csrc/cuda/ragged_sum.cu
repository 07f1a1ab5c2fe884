#include "cuda/ragged_launch.cuh"
#include "cuda/ragged_sum.cuh"

namespace afa {

void launch_ragged_rows(DType dtype, const LaunchConfig& config, const RaggedRowsParams& params) {
    if (dtype == DType::bf16)
        launch<ragged_rows_kernel<Bf16>, 0>(config, params);
    else
        launch<ragged_rows_kernel<Fp16>, 0>(config, params);
}

void launch_ragged_sum(DType dtype, const LaunchConfig& config, const RaggedSumParams& params) {
    if (dtype == DType::bf16)
        launch<ragged_sum_kernel<Bf16>, 0>(config, params);
    else
        launch<ragged_sum_kernel<Fp16>, 0>(config, params);
}

}  // namespace afa
