#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace afa {
namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "device attribute");
    return value;
}

}  // namespace

DeviceScope::DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "current device");
    if (previous_ != device)
        check(cudaSetDevice(device), "set device");
    else
        previous_ = -1;
}

DeviceScope::~DeviceScope() {
    if (previous_ >= 0)
        cudaSetDevice(previous_);
}

DeviceLimits device_limits(int device) {
    static std::mutex guard;
    static std::map<int, DeviceLimits> known;
    const std::lock_guard<std::mutex> lock(guard);
    const auto found = known.find(device);
    if (found != known.end())
        return found->second;
    const DeviceLimits limits{attribute(cudaDevAttrMultiProcessorCount, device),
                              attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                              attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
    return known.emplace(device, limits).first->second;
}

bool has_kernel_image(int device) {
    const DeviceScope scope(device);
    cudaFuncAttributes attributes;
    const bool found = cudaFuncGetAttributes(&attributes, pack_kernel<Bf16>) == cudaSuccess;
    cudaGetLastError();
    return found;
}

}  // namespace afa
