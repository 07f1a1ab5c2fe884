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
RaggedKernels make_ragged_kernels() {
    RaggedKernels table{};
    table.forward = launch<ragged_forward_kernel<T, R>, R, RaggedForwardParams>;
    table.expand = launch<ragged_expand_kernel<T, R>, R, RaggedForwardParams>;
    table.project = launch<ragged_project_kernel<T, R, false>, R, RaggedProjectParams>;
    if constexpr (R <= kSlabRank) {
        table.dy = launch<ragged_dy_kernel<T, R>, R, RaggedDyParams>;
    } else {
        table.project_dy = launch<ragged_project_kernel<T, R, true>, R, RaggedProjectParams>;
        table.db = launch<ragged_db_kernel<T, R>, R, RaggedOuterParams>;
    }
    table.x = launch<ragged_x_kernel<T, R, false>, R, RaggedOuterParams>;
    table.x_into = launch<ragged_x_kernel<T, R, true>, R, RaggedOuterParams>;
    return table;
}

template <int R>
const RaggedKernels& ragged_kernels_of(DType dtype) {
    static const RaggedKernels bf16 = make_ragged_kernels<Bf16, R>();
    static const RaggedKernels fp16 = make_ragged_kernels<Fp16, R>();
    return dtype == DType::bf16 ? bf16 : fp16;
}

}  // namespace afa
