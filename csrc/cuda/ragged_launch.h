// What the host code (ragged_ops.cpp) sees of the ragged kernels, as launch.h does for the others.
#pragma once

#include "cuda/launch.h"
#include "cuda/ragged_params.h"

namespace afa {

// The ragged kernels of one rank class.
struct RaggedKernels {
    Launcher<RaggedForwardParams> forward, expand;
    Launcher<RaggedProjectParams> project;
    Launcher<RaggedDyParams> dy;                // up to kSlabRank, else null
    Launcher<RaggedProjectParams> project_dy;   // beyond it, as db
    Launcher<RaggedOuterParams> db, x, x_into;  // x_into adds to dx
};

const RaggedKernels& ragged16_kernels(DType dtype);
const RaggedKernels& ragged32_kernels(DType dtype);
const RaggedKernels& ragged64_kernels(DType dtype);
const RaggedKernels& ragged128_kernels(DType dtype);

void launch_ragged_rows(DType dtype, const LaunchConfig& config, const RaggedRowsParams& params);
void launch_ragged_sum(DType dtype, const LaunchConfig& config, const RaggedSumParams& params);

}  // namespace afa
