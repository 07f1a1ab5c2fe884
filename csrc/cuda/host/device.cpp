// The device through the CUDA runtime: which one is current, what it can run, and launches on it.
//
// Plain C++. Tested on the simulated runtime of python_tests/ptx_machine/cuda, which plays every
// failure.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/host/device.h"
#include "cuda/host/variant.h"

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

// Of the innermost DeviceScope of this thread.
thread_local int scope_device = -1;

// What is remembered of the kernel on this device. Of devices with higher numbers than anybody has
// nothing is.
int remembered(const KernelRecord& record) {
    const bool fits = scope_device >= 0 && scope_device < KernelRecord::kDevices;
    return fits ? record.order[scope_device].load() : KernelRecord::kUnknown;
}
void remember(KernelRecord& record, int order) {
    if (scope_device >= 0 && scope_device < KernelRecord::kDevices)
        record.order[scope_device].store(order);
}

// Readies a kernel for all launches on this device, before the first one.
//
// Whatever a launch needs, the kernel may have all shared memory that the device gives a block:
// then it does not matter in which order threads ask. And the multiprocessors are to keep all that
// they can for shared memory: where kernels want different shares, one that follows another may
// have to wait until all blocks of that one have ended.
//
// `overlaps`: whether it may be started before the one before it in the stream has ended. Its code
// has to wait for that (follow_previous_kernel, prim.cuh), and only code compiled for 9.0
// and later does: not the PTX of an older architecture that the driver translates for this card.
cudaError_t prepare(const void* kernel, KernelRecord& record, bool& overlaps) {
    int order = remembered(record);
    if (order == KernelRecord::kUnknown) {
        constexpr int kCaptured = 12030;  // before, a stream could not capture such a launch
        cudaFuncAttributes code{};
        cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device_limits(scope_device).shared_per_block);
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         variant().carveout);
        if (error == cudaSuccess)
            error = cudaFuncGetAttributes(&code, kernel);
        if (error != cudaSuccess)
            return error;
        order = code.ptxVersion >= 90 && cuda_versions().driver >= kCaptured && variant().overlap
                    ? KernelRecord::kOverlaps
                    : KernelRecord::kInOrder;
        remember(record, order);
    }
    overlaps = order == KernelRecord::kOverlaps;
    return cudaSuccess;
}

}  // namespace

DeviceScope::DeviceScope(int device) : outer_(scope_device) {
    const ContextFunctions& driver = context_functions();
    CUcontext previous = nullptr;
    int current = -1;
    if (driver.get_current(&previous) != CUDA_SUCCESS)
        previous = nullptr;  // nothing is current before the driver is initialized
    if (!previous || cudaGetDevice(&current) != cudaSuccess || current != device) {
        previous_ = previous;
        check(cudaSetDevice(device), "set device");
        switched_ = true;
    }
    scope_device = device;
}

DeviceScope::~DeviceScope() {
    scope_device = outer_;
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
                              attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                              variant().chunks};
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

void launch_kernel(const void* kernel, KernelRecord& record, const LaunchConfig& config,
                   void* params) {
    const KernelPlan& plan = config.plan;
    const cudaError_t before = cudaPeekAtLastError();
    bool overlaps = false;
    cudaError_t error = prepare(kernel, record, overlaps);
    if (error == cudaSuccess) {
        cudaLaunchAttribute overlap{};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t launch{};
        launch.gridDim =
            dim3(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
        launch.blockDim = dim3(static_cast<unsigned>(plan.threads));
        launch.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
        launch.stream = static_cast<cudaStream_t>(config.stream);
        launch.attrs = &overlap;
        launch.numAttrs = overlaps ? 1 : 0;
        void* arguments[] = {params};
        error = cudaLaunchKernelExC(&launch, kernel, arguments);
        if (error == cudaErrorNotSupported && overlaps) {
            cudaGetLastError();
            remember(record, KernelRecord::kInOrder);
            launch.numAttrs = 0;
            error = cudaLaunchKernelExC(&launch, kernel, arguments);
        }
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
