// The device through the CUDA runtime: which one is current, what it can run, and launches on it.
//
// Plain C++. Tested on the simulated runtime of csrc/ptx/cuda, which plays every failure.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/launch.h"

namespace afa {
namespace {

std::string describe(cudaError_t error) {
    return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

struct CudaError : std::runtime_error {
    CudaError(const char* what, cudaError_t error)
        : std::runtime_error(std::string(what) + ": " + describe(error)), code(error) {}
    cudaError_t code;
};

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();
        throw CudaError(what, error);
    }
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "device attribute");
    return value;
}

// A function of the driver. It is asked for at run time: the module must load where no driver is.
template <typename Function>
Function* driver_function(const char* name) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    constexpr unsigned kVersion = 4000;  // that of CUDA which brought both functions
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
    check(error, name);
    if (result != cudaDriverEntryPointSuccess || !found)
        throw CudaError(name, cudaErrorSymbolNotFound);
    return reinterpret_cast<Function*>(found);
}

struct ContextFunctions {
    CUresult (*get_current)(CUcontext*) =
        driver_function<CUresult CUDAAPI(CUcontext*)>("cuCtxGetCurrent");
    CUresult (*set_current)(CUcontext) =
        driver_function<CUresult CUDAAPI(CUcontext)>("cuCtxSetCurrent");
};

const ContextFunctions& context_functions() {
    static const ContextFunctions functions;
    return functions;
}

// What only a running kernel does. Launches are asynchronous, so that a launch which returns one of
// these reports a kernel that ran before it.
bool is_fault_of_a_running_kernel(cudaError_t error) {
    switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
        return true;
    default:
        return false;
    }
}

bool launches_wait() {
    const char* blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
    return blocking && blocking[0] == '1';
}

// Asks for the shared memory that a kernel needs, once per device.
cudaError_t grant_shared_memory(const void* kernel, SharedGrants& grants, int bytes) {
    constexpr int kDefault = 48 * 1024;  // what every kernel has without asking
    if (bytes <= kDefault)
        return cudaSuccess;
    int device = 0;
    const cudaError_t unknown = cudaGetDevice(&device);
    if (unknown != cudaSuccess)
        return unknown;
    const bool remembered = device < SharedGrants::kDevices;
    if (remembered && grants.bytes[device].load() >= bytes)
        return cudaSuccess;
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (remembered && refused == cudaSuccess)
        grants.bytes[device].store(bytes);
    return refused;
}

}  // namespace

DeviceScope::DeviceScope(int device) {
    const ContextFunctions& driver = context_functions();
    CUcontext previous = nullptr;
    int current = -1;
    if (driver.get_current(&previous) != CUDA_SUCCESS)
        previous = nullptr;  // nothing is current before the driver is initialized
    if (previous && cudaGetDevice(&current) == cudaSuccess && current == device)
        return;
    previous_ = previous;
    check(cudaSetDevice(device), "set device");
    switched_ = true;
}

DeviceScope::~DeviceScope() {
    // The context and not the device number: cudaSetDevice creates a context where there is none,
    // which takes hundreds of megabytes on a GPU that this thread has never used.
    if (switched_)
        context_functions().set_current(static_cast<CUcontext>(previous_));
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

RuntimeFailure kernel_image_failure(int device) {
    try {
        const DeviceScope scope(device);
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, any_kernel()), "kernel image");
        return {};
    } catch (const CudaError& error) {
        return {cudaGetErrorName(error.code), cudaGetErrorString(error.code)};
    }
}

CudaVersions cuda_versions() {
    CudaVersions versions{0, 0};
    cudaDriverGetVersion(&versions.driver);
    cudaRuntimeGetVersion(&versions.runtime);
    return versions;
}

void launch_kernel(const void* kernel, SharedGrants& grants, const LaunchConfig& config,
                   void* params) {
    const KernelPlan& plan = config.plan;
    const cudaError_t before = cudaPeekAtLastError();
    cudaError_t error = grant_shared_memory(kernel, grants, plan.shared_bytes);
    if (error == cudaSuccess) {
        void* arguments[] = {params};
        error = cudaLaunchKernel(
            kernel, dim3(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y)),
            dim3(static_cast<unsigned>(plan.threads)), arguments, plan.shared_bytes,
            static_cast<cudaStream_t>(config.stream));
    }
    if (error == cudaSuccess)
        return;
    cudaGetLastError();  // the next launch must not report this one's error
    const std::string what = describe(error);
    if (error == before || (is_fault_of_a_running_kernel(error) && !launches_wait()))
        throw std::runtime_error(
            "a kernel that was launched earlier failed: " + what + ". The launch of the " +
            plan.kernel +
            " kernel only reports it; CUDA_LAUNCH_BLOCKING=1 shows where it happens (" +
            describe(plan, config.shape) + ")");
    throw std::runtime_error(kernel_failure(config, what.c_str()));
}

}  // namespace afa
