// Recognizes operands that pass the checks of afa_kernels/checks.py. For a small call those checks
// cost more than the kernels when Python does them. True: everything is in order. False: not
// recognized, and Python checks it and finds the words for what is wrong, if anything is.
#pragma once

#include <pybind11/pybind11.h>

namespace afa {

// x (..., K), A (r, K), B (N, r), base (..., N) with the leading sizes of x or None.
bool recognizes_lora(pybind11::handle x, pybind11::handle a, pybind11::handle b,
                     pybind11::handle base);

// x (..., K), weight (N, K) in the dtype of x, bias (N,) or None, A (r, K), B (N, r).
bool recognizes_linear(pybind11::handle x, pybind11::handle weight, pybind11::handle bias,
                       pybind11::handle a, pybind11::handle b);

}  // namespace afa
