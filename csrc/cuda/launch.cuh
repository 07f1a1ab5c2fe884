// Launches a kernel: on the device under nvcc, on the emulator otherwise.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#else
#include "emulator/buffers.h"
#endif

namespace afa {

template <auto kKernel, int R, typename Params>
void launch(const LaunchConfig& config, const Params& params) {
    const KernelPlan& plan = config.plan;
#if defined(__CUDACC__)
    constexpr int kDefaultShared = 48 * 1024;  // beyond it a kernel must ask, once per device
    constexpr int kDevices = 64;
    static std::atomic<int> granted[kDevices];
    cudaError_t error = cudaSuccess;
    if (plan.shared_bytes > kDefaultShared) {
        int device = 0;
        error = cudaGetDevice(&device);
        std::atomic<int>& shared = granted[device % kDevices];
        if (error == cudaSuccess && (device >= kDevices || shared.load() < plan.shared_bytes)) {
            error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         plan.shared_bytes);
            shared.store(plan.shared_bytes);
        }
    }
    if (error == cudaSuccess) {
        void* arguments[] = {const_cast<Params*>(&params)};
        error = cudaLaunchKernel(
            reinterpret_cast<const void*>(kKernel),
            dim3(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y)),
            dim3(static_cast<unsigned>(plan.threads)), arguments, plan.shared_bytes,
            static_cast<cudaStream_t>(config.stream));
    }
    if (error != cudaSuccess) {
        cudaGetLastError();  // the next launch must not report this one's error
        throw std::runtime_error(launch_error(config, cudaGetErrorString(error)));
    }
#else
    simt::Launch emulated{plan.kernel,       static_cast<int>(plan.grid_x),
                          plan.grid_y,       plan.threads,
                          plan.shared_bytes, emulated_buffers<R>(params)};
    const auto kernel = [](const void* p) { kKernel(*static_cast<const Params*>(p)); };
    try {
        simt::launch(emulated, kernel, &params);
    } catch (const simt::Error& error) {
        throw simt::Error(launch_error(config, error.what()));
    }
#endif
}

template <typename T, int R>
RankKernels make_rank_kernels() {
    RankKernels table{};
    table.forward = launch<forward_kernel<T, R>, R, ForwardParams>;
    table.expand = launch<expand_kernel<T, R>, R, ForwardParams>;
    table.project = launch<project_kernel<T, R, false>, R, ProjectParams>;
    table.x = launch<x_kernel<T, R>, R, OuterParams>;
    if constexpr (R <= 32) {
        table.dy = launch<dy_kernel<T, R>, R, DyParams>;
    } else {
        table.project_dy = launch<project_kernel<T, R, true>, R, ProjectParams>;
        table.db = launch<db_kernel<T, R>, R, OuterParams>;
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
