#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/prim_check.cuh"

namespace afa {

void launch_primitive_check(DType dtype, const void* in, const float* values, uint32_t* out,
                            void* stream) {
    LaunchConfig config{{}, {1, 16, 16, 16}, stream};
    config.plan.kernel = "primitive_check";
    config.plan.threads = kWarpSize;
    config.plan.shared_bytes = tile_elements(32, 16) * kElementBytes + 4 * kWarpSize * 4;
    const PrimitiveCheckParams params{static_cast<const uint16_t*>(in), values, out};
    if (dtype == DType::bf16)
        launch<primitive_check_kernel<Bf16>>(config, params);
    else
        launch<primitive_check_kernel<Fp16>>(config, params);
}

}  // namespace afa
