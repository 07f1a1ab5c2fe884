// Names and texts of the errors that this runtime returns.
#include <stdexcept>

#include "ptx_machine/cuda/runtime.h"

namespace ptx {
namespace {

const struct {
    cudaError_t code;
    const char *name, *text;
} kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorECCUncorrectable, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorUnsupportedPtxVersion, "cudaErrorUnsupportedPtxVersion",
     "the provided PTX was compiled with an unsupported toolchain."},
    {cudaErrorMissingConfiguration, "cudaErrorMissingConfiguration",
     "__global__ function call is not configured"},
    // Of the last two the text is what the machine found.
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", nullptr},
    {cudaErrorUnknown, "cudaErrorUnknown", nullptr},
};

}  // namespace

const char* error_name(cudaError_t error) {
    for (const auto& known : kErrors)
        if (known.code == error)
            return known.name;
    return "cudaError";
}

cudaError_t error_of(const std::string& name) {
    for (const auto& known : kErrors)
        if (known.name == name)
            return known.code;
    throw std::invalid_argument("this runtime returns no error " + name);
}

}  // namespace ptx

extern "C" {

const char* CUDARTAPI cudaGetErrorName(cudaError_t error) { return ptx::error_name(error); }

const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
    for (const auto& known : ptx::kErrors)
        if (known.code == error)
            return known.text ? known.text : ptx::runtime_state().message.c_str();
    return "an error of the simulated runtime";
}

}  // extern "C"
