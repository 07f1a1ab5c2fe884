#include "ptx_machine/cuda/runtime.h"

#include <cuda.h>

#include <algorithm>
#include <cstring>

#include "ptx_machine/cuda/images.h"

namespace ptx {

RuntimeState& runtime_state() {
    static RuntimeState state;
    return state;
}

void restart() {
    RuntimeState fresh;
    RuntimeState& state = runtime_state();
    fresh.devices = std::move(state.devices);
    fresh.launches = std::move(state.launches);
    fresh.seed = state.seed;
    fresh.explain = state.explain;
    fresh.granted = std::move(state.granted);  // the launch code asks for them once per process
    fresh.carveouts = std::move(state.carveouts);
    state = std::move(fresh);
}

namespace {

constexpr int kCapturesOverlaps = 12030;      // the first CUDA with programmatic edges of graphs
constexpr size_t kDefaultShared = 48 * 1024;  // what every kernel has without asking
char context_of[128];                         // contexts are told apart by their address

cudaError_t ends(cudaError_t error) {
    if (error != cudaSuccess)
        runtime_state().last = error;
    return error;
}

// How a call of the runtime starts: with what keeps it from doing anything.
cudaError_t begins(const char* function) {
    RuntimeState& state = runtime_state();
    ++state.calls[function];
    if (state.faults.driver_is_too_old)
        return ends(cudaErrorInsufficientDriver);
    const auto fault = state.faults.calls.find(function);
    return fault == state.faults.calls.end() ? cudaSuccess : ends(fault->second);
}

// As the runtime does before what needs a context, where none is current. What a kernel on that
// device has done wrong comes up.
cudaError_t begins_on_device(const char* function) {
    const cudaError_t error = begins(function);
    if (error != cudaSuccess)
        return error;
    RuntimeState& state = runtime_state();
    if (state.current < 0)
        state.current = state.selected;
    state.contexts.insert(state.current);
    const auto sticky = state.sticky.find(state.current);
    return sticky == state.sticky.end() ? cudaSuccess : ends(sticky->second);
}

// The same for a call about a kernel, which it finds by the host stub.
cudaError_t begins_with_kernel(const char* call, const void* stub, const Function*& kernel) {
    const cudaError_t error = begins_on_device(call);
    if (error != cudaSuccess)
        return error;
    const auto found = images().functions.find(stub);
    if (found == images().functions.end())
        return ends(cudaErrorInvalidDeviceFunction);
    kernel = &found->second;
    return cudaSuccess;
}

bool exists(int device) {
    return device >= 0 && static_cast<size_t>(device) < runtime_state().devices.size();
}

const DeviceModel& model_of(int device) {
    return runtime_state().devices[static_cast<size_t>(device)];
}

// The image of a kernel for a device; null: it has none.
const Module* image(const Function& function, int device) {
    const DeviceModel& model = model_of(device);
    return function.unit->module_for(10 * model.major + model.minor);
}

cudaError_t run(const CapturedLaunch& captured) {
    RuntimeState& state = runtime_state();
    Launch launch = captured.launch;
    launch.seed = state.seed++;
    launch.explain = state.explain;
    if (launch.kernel == state.unfilled_kernel)
        launch.unfilled_line = state.unfilled_line;
    try {
        LaunchRecord record;
        record.counters =
            image(images().functions.at(captured.function), captured.device)->launch(launch);
        record.kernel = launch.kernel;
        record.device = captured.device;
        std::copy(launch.grid, launch.grid + 3, record.grid);
        std::copy(launch.block, launch.block + 3, record.block);
        record.shared_bytes = launch.dynamic_shared_bytes;
        const std::pair<int, const void*> key{captured.device, captured.function};
        record.granted = state.granted.count(key) ? state.granted[key] : 0;
        record.carveout = state.carveouts.count(key) ? state.carveouts[key] : -1;
        record.overlaps = launch.overlaps;
        state.launches.push_back(record);
        return cudaSuccess;
    } catch (const std::exception& error) {
        state.message = error.what();
        if (!state.faults.asynchronous)
            return ends(cudaErrorUnknown);  // known at once, and of this launch
        state.sticky[captured.device] = cudaErrorLaunchFailure;
        return cudaSuccess;
    }
}

}  // namespace

cudaError_t replay(const std::vector<CapturedLaunch>& launches) {
    for (const CapturedLaunch& captured : launches) {
        const cudaError_t error = run(captured);
        if (error != cudaSuccess)
            return error;
    }
    return cudaSuccess;
}

}  // namespace ptx

using ptx::begins;
using ptx::begins_on_device;
using ptx::begins_with_kernel;
using ptx::ends;
using ptx::runtime_state;

extern "C" {

// What host stubs call; this project launches through cudaLaunchKernelExC, never with <<<>>>.
cudaError_t CUDARTAPI cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaErrorMissingConfiguration;
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
    return cudaErrorMissingConfiguration;
}
#if CUDART_VERSION >= 12010
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorMissingConfiguration; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaErrorMissingConfiguration;
}
#endif

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
    const cudaError_t error = begins("cudaGetDevice");
    if (error == cudaSuccess)
        *device = runtime_state().current < 0 ? runtime_state().selected : runtime_state().current;
    return error;
}

cudaError_t CUDARTAPI cudaSetDevice(int device) {
    const cudaError_t error = begins("cudaSetDevice");
    if (error != cudaSuccess)
        return error;
    if (!ptx::exists(device))
        return ends(cudaErrorInvalidDevice);
    runtime_state().selected = runtime_state().current = device;
    runtime_state().contexts.insert(device);  // since CUDA 12
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const cudaError_t error = begins("cudaDeviceGetAttribute");
    if (error != cudaSuccess)
        return error;
    if (!ptx::exists(device))
        return ends(cudaErrorInvalidDevice);
    const ptx::DeviceModel& model = ptx::model_of(device);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = model.multiprocessors;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = model.shared_per_block;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = model.shared_per_multiprocessor;
        return cudaSuccess;
    default:
        return ends(cudaErrorInvalidValue);
    }
}

cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
    const ptx::Function* kernel = nullptr;
    const cudaError_t error = begins_with_kernel("cudaFuncGetAttributes", function, kernel);
    if (error != cudaSuccess)
        return error;
    const ptx::Module* module = ptx::image(*kernel, runtime_state().current);
    if (!module)
        return ends(cudaErrorNoKernelImageForDevice);
    std::memset(attributes, 0, sizeof(*attributes));
    attributes->ptxVersion = std::stoi(module->target().substr(3));  // behind "sm_"
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute,
                                           int value) {
    const ptx::Function* kernel = nullptr;
    const cudaError_t error = begins_with_kernel("cudaFuncSetAttribute", function, kernel);
    if (error != cudaSuccess)
        return error;
    ptx::RuntimeState& state = runtime_state();
    if (!ptx::image(*kernel, state.current))
        return ends(cudaErrorNoKernelImageForDevice);
    const bool granted = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!granted && attribute != cudaFuncAttributePreferredSharedMemoryCarveout)
        return ends(cudaErrorInvalidValue);
    const int least = granted ? 0 : cudaSharedmemCarveoutDefault;
    const int most = granted ? ptx::model_of(state.current).shared_per_block : 100;
    if (value < least || value > most)
        return ends(cudaErrorInvalidValue);
    (granted ? state.granted : state.carveouts)[{state.current, function}] = value;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                          void** arguments) {
    if (runtime_state().idle) {
        ++runtime_state().idle_launches;
        return cudaSuccess;
    }
    const ptx::Function* kernel = nullptr;
    const cudaError_t error = begins_with_kernel("cudaLaunchKernelExC", function, kernel);
    if (error != cudaSuccess)
        return error;
    ptx::RuntimeState& state = runtime_state();
    const auto grant = state.granted.find({state.current, function});
    const size_t allowed = grant == state.granted.end() ? 0 : static_cast<size_t>(grant->second);
    const size_t shared = config->dynamicSmemBytes;
    if (shared > std::max(allowed, ptx::kDefaultShared))
        return ends(cudaErrorInvalidValue);
    ptx::CapturedLaunch captured{function, state.current, {}};
    ptx::Launch& launch = captured.launch;
    launch.kernel = kernel->name;
    for (unsigned k = 0; k < config->numAttrs; ++k) {
        if (config->attrs[k].id != cudaLaunchAttributeProgrammaticStreamSerialization)
            return ends(cudaErrorInvalidValue);
        launch.overlaps = config->attrs[k].val.programmaticStreamSerializationAllowed != 0;
    }
    if (launch.overlaps && !state.faults.overlaps)
        return ends(cudaErrorNotSupported);
    const dim3 sizes[2] = {config->gridDim, config->blockDim};
    uint32_t* const targets[2] = {launch.grid, launch.block};
    for (int k = 0; k < 2; ++k) {
        targets[k][0] = sizes[k].x;
        targets[k][1] = sizes[k].y;
        targets[k][2] = sizes[k].z;
    }
    launch.dynamic_shared_bytes = static_cast<uint32_t>(shared);
    try {
        const ptx::Module* module = ptx::image(*kernel, state.current);
        if (!module)
            return ends(cudaErrorNoKernelImageForDevice);
        for (const ptx::KernelInfo& info : module->kernels()) {
            if (info.name != launch.kernel)
                continue;
            launch.parameters.resize(info.parameter_bytes);
            for (size_t k = 0; k < info.parameters.size(); ++k)
                std::memcpy(launch.parameters.data() + info.parameters[k].offset, arguments[k],
                            info.parameters[k].bytes);
        }
        launch.allocations = ptx::buffers_of(launch.kernel, arguments[0]);
    } catch (const std::exception& unusable) {
        state.message = unusable.what();
        return ends(cudaErrorUnknown);
    }
    if (state.capture.running) {
        if (config->stream == state.capture.stream) {
            if (launch.overlaps && state.faults.driver_version < ptx::kCapturesOverlaps) {
                state.capture.invalidated = true;
                return ends(cudaErrorStreamCaptureUnsupported);
            }
            state.capture.launches.push_back(captured);
            return cudaSuccess;
        }
        if (!config->stream) {
            state.capture.invalidated = true;
            return ends(cudaErrorStreamCaptureImplicit);
        }
    }
    return ptx::run(captured);
}

cudaError_t CUDARTAPI cudaGetLastError() {
    const cudaError_t error = runtime_state().last;
    runtime_state().last = cudaSuccess;
    return error;
}
cudaError_t CUDARTAPI cudaPeekAtLastError() { return runtime_state().last; }

// The two functions of the driver that the launch code asks for.
static CUresult CUDAAPI get_current_context(CUcontext* context) {
    const int current = runtime_state().current;
    *context = current < 0 ? nullptr : reinterpret_cast<CUcontext>(&ptx::context_of[current]);
    return CUDA_SUCCESS;
}
static CUresult CUDAAPI set_current_context(CUcontext context) {
    runtime_state().current =
        context ? static_cast<int>(reinterpret_cast<char*>(context) - ptx::context_of) : -1;
    return CUDA_SUCCESS;
}

#if CUDART_VERSION >= 12050
cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                       unsigned long long,
                                                       cudaDriverEntryPointQueryResult* result) {
#else
cudaError_t CUDARTAPI cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                              cudaDriverEntryPointQueryResult* result) {
#endif
    const std::string wanted = name;
    *function = wanted == "cuCtxGetCurrent"   ? reinterpret_cast<void*>(&get_current_context)
                : wanted == "cuCtxSetCurrent" ? reinterpret_cast<void*>(&set_current_context)
                                              : nullptr;
    *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return begins("cudaGetDriverEntryPoint");
}

// Both answer with any driver.
cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
    *version = runtime_state().faults.driver_version;
    return cudaSuccess;
}
cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* version) {
    *version = runtime_state().faults.runtime_version;
    return cudaSuccess;
}

}  // extern "C"
