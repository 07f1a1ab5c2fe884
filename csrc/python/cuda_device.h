#pragma once

#include <pybind11/pybind11.h>

namespace afa {

// Adds what a module can tell of the CUDA runtime: kernel_image_failure and versions.
void bind_device(pybind11::module_& module);

}  // namespace afa
