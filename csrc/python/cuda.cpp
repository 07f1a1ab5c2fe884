// afa_kernels._C.cuda: the device build of the kernels.
#include <pybind11/pybind11.h>

#include "python/cuda_device.h"
#include "python/cuda_ops.h"

void bind_cuda(pybind11::module_& module) {
    pybind11::module_ cuda = module.def_submodule("cuda", "CUDA kernels for sm_80 and later.");
    afa::bind_ops(cuda);
    afa::bind_device(cuda);
}
