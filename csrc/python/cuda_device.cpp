#include "python/cuda_device.h"

#include "cuda/host/device.h"

namespace afa {

void bind_device(pybind11::module_& module) {
    module.def(
        "kernel_image_failure",
        [](int device) {
            const RuntimeFailure failure = kernel_image_failure(device);
            return pybind11::make_tuple(failure.name, failure.text);
        },
        pybind11::arg("device"),
        "Name and text of the error that keeps the device from these kernels; empty: none.");
    module.def(
        "versions",
        [] {
            const CudaVersions versions = cuda_versions();
            return pybind11::make_tuple(versions.driver, versions.runtime);
        },
        "CUDA of the driver and of the runtime, as 1000 * major + 10 * minor; 0: no driver.");
}

}  // namespace afa
