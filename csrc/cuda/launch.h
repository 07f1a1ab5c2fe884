// What the host code (ops.cpp) sees of the kernels: launchers by dtype and rank, in place of
// templates.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/params.h"
#include "cuda/plan.h"

namespace afa {

enum class DType : int { bf16, fp16 };

struct LaunchConfig {
    KernelPlan plan;
    Shape shape;
    void* stream;
};

template <typename Params>
using Launcher = void (*)(const LaunchConfig&, const Params&);

// The kernels of one rank class. A null launcher: the class does without.
struct RankKernels {
    Launcher<ForwardParams> forward, expand;
    Launcher<ProjectParams> project, project_dy;
    Launcher<DyParams> dy;
    Launcher<OuterParams> db, x;
};

// One translation unit each, so that they compile in parallel.
const RankKernels& rank16_kernels(DType dtype);
const RankKernels& rank32_kernels(DType dtype);
const RankKernels& rank64_kernels(DType dtype);
const RankKernels& rank128_kernels(DType dtype);
const RankKernels& rank_kernels(DType dtype, int rank);

void launch_reduce(DType dtype, const LaunchConfig& config, const ReduceParams& params);
void launch_pack(DType dtype, const LaunchConfig& config, const PackParams& params);

// One warp runs every primitive once: T in[512], float values[128], uint32_t out[608]
// (prim_check.cuh).
void launch_primitive_check(DType dtype, const void* in, const float* values, uint32_t* out,
                            void* stream);

// "forward kernel failed: <what> (M=..., grid ..., shared memory ...)".
std::string launch_error(const LaunchConfig& config, const char* what);

// Makes `device` current for the launches of this thread until the end of the scope.
class DeviceScope {
  public:
    explicit DeviceScope(int device);
    ~DeviceScope();
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

  private:
    int previous_;
};

DeviceLimits device_limits(int device);

// Whether this build has code that the device can run.
bool has_kernel_image(int device);

}  // namespace afa
