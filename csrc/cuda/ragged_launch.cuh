// The launchers of the ragged kernels of one rank class.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ragged.cuh"
#include "cuda/ragged_launch.h"

#if !defined(__CUDACC__)
#include "emulator/ragged_buffers.h"
#endif

namespace afa {

template <typename T, int R>
constexpr RaggedKernels make_ragged_kernels() {
    return {launch<ragged_forward_kernel<T, R>, R, RaggedForwardParams>,
            launch<ragged_dz_kernel<T, R>, R, RaggedDzParams>,
            launch<ragged_db_kernel<T, R>, R, RaggedOuterParams>,
            launch<ragged_x_kernel<T, R>, R, RaggedOuterParams>};
}

template <int R>
const RaggedKernels& ragged_kernels_of(DType dtype) {
    static const RaggedKernels bf16 = make_ragged_kernels<Bf16, R>();
    static const RaggedKernels fp16 = make_ragged_kernels<Fp16, R>();
    return dtype == DType::bf16 ? bf16 : fp16;
}

}  // namespace afa
