#pragma once

#include <pybind11/pybind11.h>

namespace afa {

// Adds forward, backward, their workspace sizes and launch_plan to `module`.
void bind_ops(pybind11::module_& module);

}  // namespace afa
