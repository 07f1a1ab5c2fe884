#include "python/checks.h"

#include <algorithm>

#include "python/tensor.h"

namespace py = pybind11;

namespace afa {

namespace {

bool is_matrix(const dlpack::Tensor& t, int64_t rows, int64_t cols) {
    return t.dimensions == 2 && t.sizes[0] == rows && t.sizes[1] == cols;
}

bool same_device(const dlpack::Tensor& t, const dlpack::Tensor& x) {
    return t.device_type == x.device_type && t.device_id == x.device_id;
}

int64_t last_size(const dlpack::Tensor& t) { return t.sizes[t.dimensions - 1]; }

// Reads x and whether A and B fit it; *n is N.
bool fits(py::handle x, py::handle a, py::handle b, dlpack::Tensor* xs, int64_t* n) {
    dlpack::Tensor as, bs;
    if (!lend_plain(x, xs) || !lend_plain(a, &as) || !lend_plain(b, &bs))
        return false;
    if (!same_device(as, *xs) || !same_device(bs, *xs))
        return false;
    if (xs->dimensions < 1 || as.dimensions != 2 || bs.dimensions != 2)
        return false;
    const int64_t k = last_size(*xs), r = as.sizes[0];
    *n = bs.sizes[0];
    return k >= 1 && *n >= 1 && r >= 1 && is_matrix(as, r, k) && is_matrix(bs, *n, r);
}

}  // namespace

bool are_plain(py::args tensors) {
    dlpack::Tensor lent;
    return std::all_of(tensors.begin(), tensors.end(),
                       [&](py::handle t) { return t.is_none() || lend_plain(t, &lent); });
}

bool recognizes_lora(py::handle x, py::handle a, py::handle b, py::handle base) {
    dlpack::Tensor xs, bases;
    int64_t n;
    if (!fits(x, a, b, &xs, &n))
        return false;
    if (base.is_none())
        return true;
    return lend_plain(base, &bases) && same_device(bases, xs) &&
           bases.dimensions == xs.dimensions && last_size(bases) == n &&
           std::equal(xs.sizes, xs.sizes + xs.dimensions - 1, bases.sizes);
}

bool recognizes_linear(py::handle x, py::handle weight, py::handle bias, py::handle a,
                       py::handle b) {
    dlpack::Tensor xs, weights, biases;
    int64_t n;
    if (!fits(x, a, b, &xs, &n) || !lend_plain(weight, &weights) || !same_device(weights, xs))
        return false;
    const bool same_dtype =
        xs.dtype.code == weights.dtype.code && xs.dtype.bits == weights.dtype.bits;
    if (!same_dtype || !is_matrix(weights, n, last_size(xs)))
        return false;
    return bias.is_none() || (lend_plain(bias, &biases) && same_device(biases, xs) &&
                              biases.dimensions == 1 && biases.sizes[0] == n);
}

bool recognizes_shared(py::handle x, const py::list& layers) {
    return std::all_of(layers.begin(), layers.end(), [&](py::handle layer) {
        PyObject* tuple = layer.ptr();
        if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) < 4)
            return false;
        const auto field = [&](py::ssize_t i) { return py::handle(PyTuple_GET_ITEM(tuple, i)); };
        return recognizes_linear(x, field(0), field(1), field(2), field(3));
    });
}

}  // namespace afa
