#pragma once

#include <pybind11/pybind11.h>

#include "cuda/plan.h"

namespace afa {

// Adds forward, backward, their workspace sizes and launch_plan to `module`.
void bind_ops(pybind11::module_& module);

// A kernel with its launch parameters, for ``plan``.
pybind11::dict described(const KernelPlan& plan, const DeviceLimits& device);

}  // namespace afa
