// Tensors as arguments of a bound function: each is read where it lies (tensor.h), in a fraction of
// the time that Python takes for its attributes.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/host/device.h"
#include "cuda/host/ops.h"
#include "python/tensor.h"

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

    // A and B have the dtype of x or float32.
    bool is_weight_for(const TensorArgument& x) const { return element == x.element || is_float(); }

    // The kernels read a matrix of 16-bit elements where its columns are adjacent and its rows
    // start at 16 bytes.
    bool is_readable() const {
        return strides[1] == 1 && strides[0] % 8 == 0 &&
               reinterpret_cast<uintptr_t>(data) % 16 == 0;
    }
    // And write one whose rows lie one behind the other.
    bool is_packed() const { return is_readable() && strides[0] == sizes[1]; }
    // z (M, r) is packed, in pairs of elements where r is even. One row of a wider matrix is packed
    // wherever it starts.
    bool is_readable_z() const {
        const bool packed =
            (sizes[1] == 1 || strides[1] == 1) && (sizes[0] == 1 || strides[0] == sizes[1]);
        return packed && (sizes[1] % 2 != 0 || reinterpret_cast<uintptr_t>(data) % 4 == 0);
    }
};

// What every call has, apart from its shape and members.
inline void fill_branch(BranchCall& call, const TensorArgument& x, const TensorArgument& seed,
                        int threshold, const TensorArgument& workspace, int device,
                        uintptr_t stream) {
    call.dtype = x.element == Element::bf16 ? DType::bf16 : DType::fp16;
    call.x = x.data;
    call.x_stride = x.strides[0];
    call.seed = seed.pointer<int64_t>();
    call.threshold = threshold;
    call.workspace = workspace.data;
    call.stream = reinterpret_cast<void*>(stream);
    call.device = device_limits(device);
}

// False where the kernels cannot read or write an operand where it lies.
inline bool fill_output(MemberOutput& output, const TensorArgument& base, const TensorArgument& y,
                        const TensorArgument& z) {
    output = {base.data, base.strides[0], y.data, y.strides[0], z.data};
    return y.is_readable() && (!base.present || base.is_readable());
}
inline bool fill_gradients(MemberGradients& gradients, const TensorArgument& dy,
                           const TensorArgument& z, const TensorArgument& da,
                           const TensorArgument& db) {
    gradients = {dy.data, dy.strides[0], z.data, da.data, db.data, da.is_float(), db.is_float()};
    return dy.is_readable() && (!z.present || z.is_readable_z());
}

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
