// What the host code (ops.cpp) sees of the kernels: launchers by dtype and rank, in place of
// templates.
#pragma once

#include <atomic>
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
    Launcher<OuterPass> db;
    Launcher<OuterParams> x;
};

// One translation unit each, so that they compile in parallel.
const RankKernels& rank16_kernels(DType dtype);
const RankKernels& rank32_kernels(DType dtype);
const RankKernels& rank64_kernels(DType dtype);
const RankKernels& rank_kernels(DType dtype, int rank);

void launch_pack(DType dtype, const LaunchConfig& config, const PackParams& params);
void launch_reduce(DType dtype, const LaunchConfig& config, const ReduceParams& params);

// One warp runs every primitive once: T in[512], float values[128], uint32_t out[608]
// (prim_check.cuh).
void launch_primitive_check(DType dtype, const void* in, const float* values, uint32_t* out,
                            void* stream);

// "forward kernel failed: <what> (M=..., grid ..., shared memory ...)".
inline std::string kernel_failure(const LaunchConfig& config, const char* what) {
    return std::string(config.plan.kernel) + " kernel failed: " + what + " (" +
           describe(config.plan, config.shape) + ")";
}

// --- What device.cpp does on a device; the emulator has a DeviceScope and device_limits of its own

// What is known of a kernel, by device, so that the runtime is asked once: whether it may start
// before the kernel before it has ended.
struct KernelRecord {
    static constexpr int kDevices = 64;
    enum : int { kUnknown, kInOrder, kOverlaps };
    std::atomic<int> order[kDevices];
};

// Launches a kernel of one parameter on the device of the DeviceScope. Raises std::runtime_error
// that says whether the launch itself failed or a kernel before it.
void launch_kernel(const void* kernel, KernelRecord& record, const LaunchConfig& config,
                   void* params);

// Any kernel of this build, to ask the runtime about.
const void* any_kernel();

// Makes `device` current for the launches of this thread until the end of the scope. Only `device`
// gets a context by that.
class DeviceScope {
  public:
    explicit DeviceScope(int device);
    ~DeviceScope();
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

  private:
    int outer_ = -1;            // device of the scope around this one
    void* previous_ = nullptr;  // the context that was current, null: none
    bool switched_ = false;
};

DeviceLimits device_limits(int device);

// A call of the CUDA runtime that failed, "cudaErrorInsufficientDriver" and what that means.
struct RuntimeFailure {
    std::string name, text;
};

// Why the device cannot run this build's kernels; two empty strings where it can. Raises nothing.
RuntimeFailure kernel_image_failure(int device);

// As 1000 * major + 10 * minor; the driver's is the newest CUDA that it supports, 0: no driver.
struct CudaVersions {
    int driver, runtime;
};
CudaVersions cuda_versions();

}  // namespace afa
