// The launchers of each kernel.
#pragma once

#include "cuda/kernels/backward.cuh"
#include "cuda/kernels/forward.cuh"
#include "cuda/kernels/launch.h"
#include "cuda/kernels/pack.cuh"
#include "cuda/kernels/reduce.cuh"

namespace afa {

template <auto kKernel, typename Params>
void launch(const LaunchConfig& config, const Params& params) {
    static KernelRecord record;
    launch_kernel(reinterpret_cast<const void*>(kKernel), record, config,
                  const_cast<Params*>(&params));
}

template <typename T, int R>
RankKernels make_rank_kernels() {
    RankKernels table{};
    table.forward = launch<forward_kernel<T, R>, ForwardParams>;
    table.expand = launch<expand_kernel<T, R>, ForwardParams>;
    table.project = launch<project_kernel<T, R>, ProjectParams>;
    table.x = launch<x_kernel<T, R>, OuterParams>;
    if constexpr (R <= 32) {
        table.dy = launch<dy_kernel<T, R>, DyParams>;
    } else {
        table.project_dy = launch<project_dy_kernel<T, R>, ProjectParams>;
        table.db = launch<db_kernel<T, R>, OuterPass>;
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
