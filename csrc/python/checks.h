// Recognizes operands that pass the checks of afa_kernels/operator/checks.py, since in Python those
// checks take longer than the kernels of a small call. True means that everything is in order.
// False means only that the operands are not of the common kind: Python then checks them itself,
// and raises the error if there is one.
#pragma once

#include <pybind11/pybind11.h>

namespace afa {

// Whether all are ordinary floating tensors on the CPU or a CUDA device whose memory holds their
// values, or None.
bool are_plain(pybind11::args tensors);

// x (..., K), A (r, K), B (N, r), base (..., N) with the leading sizes of x or None.
bool recognizes_lora(pybind11::handle x, pybind11::handle a, pybind11::handle b,
                     pybind11::handle base);

// x (..., K), weight (N, K) in the dtype of x, bias (N,) or None, A (r, K), B (N, r).
bool recognizes_linear(pybind11::handle x, pybind11::handle weight, pybind11::handle bias,
                       pybind11::handle a, pybind11::handle b);

// recognizes_linear of x and each layer: tuples that begin with weight, bias, A and B.
bool recognizes_shared(pybind11::handle x, const pybind11::list& layers);

}  // namespace afa
