#pragma once

#include <pybind11/pybind11.h>

namespace afa {

// Adds ragged_forward, ragged_backward, their workspace size and ragged_kernels to `module`.
void bind_ragged_ops(pybind11::module_& module);

}  // namespace afa
