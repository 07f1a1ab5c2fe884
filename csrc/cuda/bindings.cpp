// afa_kernels._C.cuda: the device build of the kernels.
#include <pybind11/pybind11.h>

#include "cuda/bind_ops.h"
#include "cuda/launch.h"

void bind_cuda(pybind11::module_& module) {
    pybind11::module_ cuda = module.def_submodule("cuda", "CUDA kernels for sm_80 and later.");
    afa::bind_ops(cuda);
    cuda.def("has_kernel_image", &afa::has_kernel_image, pybind11::arg("device"));
}
