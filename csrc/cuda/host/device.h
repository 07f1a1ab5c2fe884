// The device of a call, and what it is asked.
#pragma once

#include <string>

#include "cuda/host/plan.h"

namespace afa {

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
