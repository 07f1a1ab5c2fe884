// Operands of the CPU kernels from what Python hands over.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/philox.h"
#include "cpu/params.h"
#include "python/tensor.h"

namespace afa::cpu {

namespace py = pybind11;

static_assert(static_cast<int>(Element::f32) == static_cast<int>(Dtype::f32) &&
              static_cast<int>(Element::bf16) == static_cast<int>(Dtype::bf16) &&
              static_cast<int>(Element::f16) == static_cast<int>(Dtype::f16) &&
              static_cast<int>(Element::f64) == static_cast<int>(Dtype::f64));

inline Dtype dtype_of(const TensorView& view, const char* name) {
    if (view.element > Element::f64)
        throw py::type_error(std::string(name) + ": expected a floating dtype");
    return static_cast<Dtype>(static_cast<int>(view.element));
}

inline void* data_of(const TensorView& view, const char* name) {
    if (view.data == nullptr)
        throw py::value_error(std::string(name) + ": expected a tensor that has memory");
    return view.data;
}

inline Matrix matrix(const TensorView& view, const char* name, int64_t rows, int64_t cols) {
    if (view.dimensions != 2 || view.sizes[0] != rows || view.sizes[1] != cols)
        throw py::value_error(std::string(name) + ": expected shape (" + std::to_string(rows) +
                              ", " + std::to_string(cols) + ")");
    return {data_of(view, name), view.strides[0], view.strides[1], dtype_of(view, name)};
}

// None: absent.
inline Matrix matrix(py::handle tensor, const char* name, int64_t rows, int64_t cols, Dtype dtype) {
    if (tensor.is_none())
        return {};
    const Matrix found = matrix(view_of(tensor, name), name, rows, cols);
    if (found.dtype != dtype)
        throw py::type_error(std::string(name) +
                             ": expected the dtype of the operand it goes with");
    return found;
}

// As matrix, for a tensor that must be contiguous.
inline Matrix dense(py::handle tensor, const char* name, int64_t rows, int64_t cols, Dtype dtype) {
    Matrix found = matrix(tensor, name, rows, cols, dtype);
    const bool adjacent =
        (cols == 1 || found.col_stride == 1) && (rows == 1 || found.row_stride == cols);
    if (found.data != nullptr && !adjacent)
        throw py::value_error(std::string(name) + ": expected a contiguous tensor");
    found.row_stride = cols;  // the strides of a single row or column can be anything
    found.col_stride = 1;
    return found;
}

template <class T>
const T* scalar(py::handle tensor, const char* name, Element element) {
    const TensorView view = view_of(tensor, name);
    if (view.dimensions != 0 || view.element != element || view.data == nullptr)
        throw py::type_error(std::string(name) + ": expected a 0-dim " +
                             (element == Element::i64 ? "int64" : "float32") + " tensor");
    return static_cast<const T*>(view.data);
}

// What forward and backward have in common: x, its sizes, and how it is dropped.
template <class Params>
Params common(py::handle x, py::handle seed, int dropout, int threads) {
    if (dropout < 0 || dropout >= kDropoutLevels)
        throw std::invalid_argument("dropout: expected 0..255");
    const TensorView view = view_of(x, "x");
    Params p;
    p.m = view.sizes[0];
    p.k = view.sizes[1];
    if (p.m < 1 || p.k < 1)
        throw std::invalid_argument("x: expected M, K >= 1");
    p.x = matrix(view, "x", p.m, p.k);
    if (p.x.dtype == Dtype::f64)
        throw std::invalid_argument("x: the CPU kernels do not take float64");
    p.dtype = p.x.dtype;
    p.seed = dropout > 0 ? scalar<int64_t>(seed, "seed", Element::i64) : nullptr;
    p.dropout = dropout;
    p.threads = threads < 1 ? 1 : threads;
    return p;
}

template <class Params>
void set_dx(Params& p, py::handle dx, bool accumulate_dx) {
    p.dx = dense(dx, "dx", p.m, p.k, p.dtype);
    p.accumulate_dx = accumulate_dx;
    if (accumulate_dx && p.dropout > 0)
        throw std::invalid_argument("accumulate_dx: not with dropout");
}

}  // namespace afa::cpu
