// Reads torch tensors where they lie, without torch's headers or libraries: one build of the module
// serves every torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "python/dlpack.h"

namespace afa {

enum class Element : int { f32, bf16, f16, f64, i64, i32, other };

// A tensor of at most three dimensions. Sizes and strides are in elements; a missing dimension has
// size 1 and stride 0. It holds no reference: use it while the caller holds the tensor.
struct TensorView {
    static constexpr int kMaxDimensions = 3;
    void* data = nullptr;
    int dimensions = 0;
    int64_t sizes[kMaxDimensions] = {1, 1, 1};
    int64_t strides[kMaxDimensions] = {0, 0, 0};
    Element element = Element::other;
    bool on_cpu = false;
};

// Learns torch's types from the imported module, before any tensor is read.
void use_torch(const pybind11::module_& torch);

// Whether this torch lends tensors through DLPack's exchange table (2.10 and later do), which takes
// a fraction of the time of its Python attributes.
bool has_exchange_table();

// Throws TypeError or ValueError with `name` unless `tensor` is a torch tensor on the CPU of at
// most three dimensions.
TensorView view_of(pybind11::handle tensor, const char* name);

// As view_of, of a tensor on any device.
TensorView view_anywhere(pybind11::handle tensor, const char* name);

// As view_of, through the attributes that every torch has.
TensorView view_by_attributes(pybind11::handle tensor, const char* name);

// A tensor of torch's own types, dense, on the CPU or a CUDA device and of a floating dtype, of any
// dimensions, whose memory holds its values (torch can negate one lazily, and keep zeros without
// memory); false if it is anything else, or if this torch has no exchange table. Never throws.
// `out` is valid while the caller holds the tensor.
bool lend_plain(pybind11::handle tensor, dlpack::Tensor* out);

}  // namespace afa
