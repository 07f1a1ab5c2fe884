// The checks of afa_kernels/checks.py for operands that pass them: on the CPU they cost more than a
// small call's kernels when Python does them. A false may mean anything; Python then finds out, and
// names what is wrong.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace afa {

// x (..., K), A (r, K), B (N, r).
bool accepts_branch(pybind11::handle x, pybind11::handle a, pybind11::handle b);

// base (..., N) with the leading sizes of x.
bool accepts_base(pybind11::handle base, pybind11::handle x, int64_t n);

// weight (N, K) in the dtype of x, bias (N,) or None.
bool accepts_linear(pybind11::handle x, pybind11::handle weight, pybind11::handle bias, int64_t n);

}  // namespace afa
