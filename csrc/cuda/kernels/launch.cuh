// Launches a kernel: on the device under nvcc, on the emulator otherwise.
#pragma once

#include "cuda/kernels/backward.cuh"
#include "cuda/kernels/forward.cuh"
#include "cuda/kernels/launch.h"
#include "cuda/kernels/pack.cuh"
#include "cuda/kernels/reduce.cuh"

#if !defined(__CUDACC__)
#include "emulator/buffers.h"
#endif

namespace afa {

template <auto kKernel, int R, typename Params>
void launch(const LaunchConfig& config, const Params& params) {
#if defined(__CUDACC__)
    static KernelRecord record;
    launch_kernel(reinterpret_cast<const void*>(kKernel), record, config,
                  const_cast<Params*>(&params));
#else
    const KernelPlan& plan = config.plan;
    simt::Launch emulated{plan.kernel,       static_cast<int>(plan.grid_x),
                          plan.grid_y,       plan.threads,
                          plan.shared_bytes, emulated_buffers<R>(params)};
    const auto kernel = [](const void* p) { kKernel(*static_cast<const Params*>(p)); };
    try {
        simt::launch(emulated, kernel, &params);
    } catch (const simt::Error& error) {
        throw simt::Error(kernel_failure(config, error.what()));
    }
#endif
}

template <typename T, int R>
RankKernels make_rank_kernels() {
    RankKernels table{};
    table.forward = launch<forward_kernel<T, R>, R, ForwardParams>;
    table.expand = launch<expand_kernel<T, R>, R, ForwardParams>;
    table.project = launch<project_kernel<T, R>, R, ProjectParams>;
    table.x = launch<x_kernel<T, R>, R, OuterParams>;
    if constexpr (R <= 32) {
        table.dy = launch<dy_kernel<T, R>, R, DyParams>;
    } else {
        table.project_dy = launch<project_dy_kernel<T, R>, R, ProjectParams>;
        table.db = launch<db_kernel<T, R>, R, OuterPass>;
    }
    return table;
}

template <int R>
const RankKernels& rank_kernels_of(DType dtype) {
    static const RankKernels bf16 = make_rank_kernels<Bf16, R>();
    static const RankKernels fp16 = make_rank_kernels<Fp16, R>();
    return dtype == DType::bf16 ? bf16 : fp16;
}

}  // namespace afa
