#include "ptx/cuda/runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

namespace ptx {
namespace {

// A translation unit's device code: nvcc's fat binary, which the build keeps uncompressed and to
// PTX.
struct Unit {
    std::string text;
    std::unique_ptr<Module> module;
};

struct Registry {
    std::vector<std::unique_ptr<Unit>> units;
    std::map<const void*, std::pair<Unit*, std::string>> kernels;  // by host stub
    std::map<const void*, int> granted;                            // shared memory beyond 48 KiB
    int device = 0;
    cudaError_t last = cudaSuccess;
    std::string message;  // of the last launch that failed
};

Registry& registry() {
    static Registry all;
    return all;
}

// What __cudaRegisterFatBinary is given, and the head of the data that it points to.
struct FatBinaryWrapper {
    int magic, version;
    const unsigned char* data;
    void* unused;
};
struct FatBinaryHeader {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;  // behind the header
};

std::string ptx_of(const FatBinaryWrapper& wrapper) {
    FatBinaryHeader header;
    std::memcpy(&header, wrapper.data, sizeof(header));
    if (header.magic != 0xBA55ED50u)
        return "";
    const std::string all(reinterpret_cast<const char*>(wrapper.data) + header.header_bytes,
                          header.bytes);
    const size_t start = all.find(".version");
    if (start == std::string::npos)
        return "";
    return all.substr(start, all.find('\0', start) - start);
}

cudaError_t ends(cudaError_t error) {
    if (error != cudaSuccess)
        registry().last = error;
    return error;
}

Module& module_of(Unit& unit) {
    if (!unit.module) {
        if (unit.text.empty())
            throw LoadError("a translation unit holds no uncompressed PTX");
        const auto& edit = runtime_state().edit;
        unit.module = std::make_unique<Module>(edit ? edit(unit.text) : unit.text);
    }
    return *unit.module;
}

}  // namespace

RuntimeState& runtime_state() {
    static RuntimeState state;
    return state;
}

void forget_modules() {
    for (auto& unit : registry().units)
        unit->module.reset();
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const auto& entry : registry().kernels)
        names.push_back(entry.second.second);
    std::sort(names.begin(), names.end());
    return names;
}

}  // namespace ptx

using ptx::ends;
using ptx::registry;
using ptx::runtime_state;

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
    auto unit = std::make_unique<ptx::Unit>();
    unit->text = ptx::ptx_of(*static_cast<ptx::FatBinaryWrapper*>(wrapper));
    registry().units.push_back(std::move(unit));
    return reinterpret_cast<void**>(registry().units.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void** unit, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
    registry().kernels[host] = {reinterpret_cast<ptx::Unit*>(unit), name};
}

// What host stubs call; this project launches through cudaLaunchKernel, never with <<<>>>.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
    return cudaErrorMissingConfiguration;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorMissingConfiguration; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaErrorMissingConfiguration;
}

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
    *device = registry().device;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaSetDevice(int device) {
    if (device < 0 || static_cast<size_t>(device) >= runtime_state().devices.size())
        return ends(cudaErrorInvalidDevice);
    registry().device = device;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || static_cast<size_t>(device) >= runtime_state().devices.size())
        return ends(cudaErrorInvalidDevice);
    const ptx::DeviceModel& model = runtime_state().devices[static_cast<size_t>(device)];
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
    if (!registry().kernels.count(function))
        return ends(cudaErrorInvalidDeviceFunction);
    std::memset(attributes, 0, sizeof(*attributes));
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute,
                                           int value) {
    const ptx::DeviceModel& model = runtime_state().devices[static_cast<size_t>(registry().device)];
    if (!registry().kernels.count(function) ||
        attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
        value > model.shared_per_block)
        return ends(cudaErrorInvalidValue);
    registry().granted[function] = value;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaLaunchKernel(const void* function, dim3 grid, dim3 block,
                                       void** arguments, size_t shared, cudaStream_t) {
    const auto found = registry().kernels.find(function);
    if (found == registry().kernels.end())
        return ends(cudaErrorInvalidDeviceFunction);
    const auto grant = registry().granted.find(function);
    const size_t allowed =
        grant == registry().granted.end() ? 48 * 1024 : static_cast<size_t>(grant->second);
    if (shared > std::max<size_t>(allowed, 48 * 1024))
        return ends(cudaErrorInvalidValue);
    ptx::Launch launch;
    launch.kernel = found->second.second;
    const dim3 sizes[2] = {grid, block};
    uint32_t* const targets[2] = {launch.grid, launch.block};
    for (int k = 0; k < 2; ++k) {
        targets[k][0] = sizes[k].x;
        targets[k][1] = sizes[k].y;
        targets[k][2] = sizes[k].z;
    }
    launch.dynamic_shared_bytes = static_cast<uint32_t>(shared);
    launch.seed = runtime_state().seed++;
    try {
        const ptx::Module& module = ptx::module_of(*found->second.first);
        for (const ptx::KernelInfo& info : module.kernels()) {
            if (info.name != launch.kernel)
                continue;
            launch.parameters.resize(info.parameter_bytes);
            for (size_t k = 0; k < info.parameters.size(); ++k)
                std::memcpy(launch.parameters.data() + info.parameters[k].offset, arguments[k],
                            info.parameters[k].bytes);
        }
        launch.allocations = ptx::buffers_of(launch.kernel, arguments[0]);
        ptx::LaunchRecord record;
        record.counters = module.launch(launch);
        record.kernel = launch.kernel;
        std::copy(launch.grid, launch.grid + 3, record.grid);
        std::copy(launch.block, launch.block + 3, record.block);
        record.shared_bytes = launch.dynamic_shared_bytes;
        runtime_state().launches.push_back(record);
    } catch (const std::exception& error) {
        registry().message = error.what();
        // Known at once, and of this launch. On hardware it would come up later, as a sticky error
        // that the launch code must not blame on the kernel at hand.
        return ends(cudaErrorUnknown);
    }
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGetLastError() {
    const cudaError_t error = registry().last;
    registry().last = cudaSuccess;
    return error;
}
cudaError_t CUDARTAPI cudaPeekAtLastError() { return registry().last; }

const char* CUDARTAPI cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorUnknown ? "cudaErrorUnknown" : "cudaError";
}
// Of a failed launch, what the machine found.
const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorUnknown:
        return registry().message.c_str();
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction:
        return "invalid device function";
    default:
        return "an error of the simulated runtime";
    }
}

// The two functions of the driver that the launch code asks for. One context, which is all that a
// process on one device at a time needs.
static CUresult CUDAAPI get_current_context(CUcontext* context) {
    *context = reinterpret_cast<CUcontext>(&registry());
    return CUDA_SUCCESS;
}
static CUresult CUDAAPI set_current_context(CUcontext) { return CUDA_SUCCESS; }

cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                       unsigned long long,
                                                       cudaDriverEntryPointQueryResult* result) {
    const std::string wanted = name;
    *function = wanted == "cuCtxGetCurrent"   ? reinterpret_cast<void*>(&get_current_context)
                : wanted == "cuCtxSetCurrent" ? reinterpret_cast<void*>(&set_current_context)
                                              : nullptr;
    *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

}  // extern "C"
