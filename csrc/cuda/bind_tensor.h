// Tensors as arguments of a bound function: each is read where it lies (tensor.h), in a fraction of
// the time that Python takes for its attributes.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/ops.h"
#include "tensor.h"

namespace afa {

// A tensor or None, valid while the caller holds it.
struct TensorArgument : TensorView {
    bool present = false;

    template <typename T = void>
    T* pointer() const {
        return static_cast<T*>(data);
    }
    bool is_float() const { return element == Element::f32; }
    WeightOperand weight() const { return {data, strides[0], strides[1], is_float()}; }

    // The kernels read a matrix of 16-bit elements where its columns are adjacent and its rows
    // start at 16 bytes.
    bool is_readable() const {
        return strides[1] == 1 && strides[0] % 8 == 0 &&
               reinterpret_cast<uintptr_t>(data) % 16 == 0;
    }
    // z (M, r) is packed, in pairs of elements where r is even. One row of a wider matrix is packed
    // wherever it starts.
    bool is_readable_z() const {
        const bool packed =
            (sizes[1] == 1 || strides[1] == 1) && (sizes[0] == 1 || strides[0] == sizes[1]);
        return packed && (sizes[1] % 2 != 0 || reinterpret_cast<uintptr_t>(data) % 4 == 0);
    }
};

}  // namespace afa

namespace pybind11::detail {

template <>
struct type_caster<afa::TensorArgument> {
    PYBIND11_TYPE_CASTER(afa::TensorArgument, const_name("torch.Tensor | None"));

    bool load(handle source, bool) {
        if (source.is_none())
            return true;
        static_cast<afa::TensorView&>(value) = afa::view_anywhere(source, "a tensor");
        value.present = true;
        return true;
    }
};

}  // namespace pybind11::detail
