#include "cuda/tests/fake_runtime.h"

#include <cuda.h>

#include <cstring>

FakeRuntime fake;

namespace {

// Contexts are told apart by their address.
char contexts[FakeRuntime::kDevices];

CUresult CUDAAPI get_current(CUcontext* context) {
    *context = fake.current < 0 ? nullptr : reinterpret_cast<CUcontext>(&contexts[fake.current]);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI set_current(CUcontext context) {
    fake.current = context ? static_cast<int>(reinterpret_cast<char*>(context) - contexts) : -1;
    return CUDA_SUCCESS;
}

cudaError_t ends_with(cudaError_t error) {
    if (fake.driver_is_too_old)
        error = cudaErrorInsufficientDriver;
    if (error != cudaSuccess)
        fake.last_error = error;
    return error;
}

// As the runtime does before what needs a context, where none is current.
void need_context() {
    if (fake.current < 0)
        fake.current = fake.selected;
    fake.has_context[fake.current] = true;
}

}  // namespace

extern "C" {

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
    *device = fake.current < 0 ? fake.selected : fake.current;
    return ends_with(cudaSuccess);
}

cudaError_t CUDARTAPI cudaSetDevice(int device) {
    ++fake.set_device_calls;
    fake.selected = fake.current = device;
    need_context();  // since CUDA 12
    return ends_with(cudaSuccess);
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 1;
    return ends_with(cudaSuccess);
}

cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
    need_context();
    return ends_with(fake.image_result);
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    need_context();
    ++fake.attribute_calls;
    return ends_with(fake.attribute_result);
}

cudaError_t CUDARTAPI cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
    need_context();
    ++fake.launches;
    return ends_with(fake.launch_result);
}

cudaError_t CUDARTAPI cudaPeekAtLastError() { return fake.last_error; }

cudaError_t CUDARTAPI cudaGetLastError() {
    const cudaError_t error = fake.last_error;
    fake.last_error = cudaSuccess;
    return error;
}

const char* CUDARTAPI cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaErrorInvalidValue:
        return "cudaErrorInvalidValue";
    case cudaErrorInsufficientDriver:
        return "cudaErrorInsufficientDriver";
    case cudaErrorNoKernelImageForDevice:
        return "cudaErrorNoKernelImageForDevice";
    case cudaErrorIllegalAddress:
        return "cudaErrorIllegalAddress";
    default:
        return "another error";
    }
}

const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "its text"; }

cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
    *version = fake.driver_version;  // an old driver answers this one
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}

#if CUDART_VERSION >= 12050
cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                                       unsigned, unsigned long long,
                                                       cudaDriverEntryPointQueryResult* result) {
#else
cudaError_t CUDARTAPI cudaGetDriverEntryPoint(const char* symbol, void** function,
                                              unsigned long long,
                                              cudaDriverEntryPointQueryResult* result) {
#endif
    *result = cudaDriverEntryPointSuccess;
    if (!std::strcmp(symbol, "cuCtxGetCurrent"))
        *function = reinterpret_cast<void*>(&get_current);
    else if (!std::strcmp(symbol, "cuCtxSetCurrent"))
        *function = reinterpret_cast<void*>(&set_current);
    else
        *result = cudaDriverEntryPointSymbolNotFound;
    return ends_with(cudaSuccess);
}

}  // extern "C"
