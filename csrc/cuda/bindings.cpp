// afa_kernels._C.cuda: the device build of the kernels.
#include <pybind11/pybind11.h>

#include "cuda/bind_ops.h"
#include "cuda/launch.h"

void bind_cuda(pybind11::module_& module) {
    pybind11::module_ cuda = module.def_submodule("cuda", "CUDA kernels for sm_80 and later.");
    afa::bind_ops(cuda);
    cuda.def(
        "kernel_image_failure",
        [](int device) {
            const afa::RuntimeFailure failure = afa::kernel_image_failure(device);
            return pybind11::make_tuple(failure.name, failure.text);
        },
        pybind11::arg("device"),
        "Name and text of the error that keeps the device from these kernels; empty: none.");
    cuda.def(
        "versions",
        [] {
            const afa::CudaVersions versions = afa::cuda_versions();
            return pybind11::make_tuple(versions.driver, versions.runtime);
        },
        "CUDA of the driver and of the runtime, as 1000 * major + 10 * minor; 0: no driver.");
}
