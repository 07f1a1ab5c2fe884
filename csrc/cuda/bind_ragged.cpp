// The Python face of ragged_ops.h.
#include "cuda/bind_ragged.h"

#include <pybind11/stl.h>

#include "cuda/bind_ops.h"
#include "cuda/bind_tensor.h"
#include "cuda/ragged_ops.h"

namespace afa {
namespace {

namespace py = pybind11;

using Sizes = std::tuple<int64_t, int, int, int>;  // T, K, N, r
using Tensor = const TensorArgument&;
// A (G, r, K), B (G, N, r), activation.
using Weights3 = std::tuple<TensorArgument, TensorArgument, int>;
// offsets, ranks, alpha_t, scaling: one value for each group; and the scaling where that is None.
using GroupValues =
    std::tuple<TensorArgument, TensorArgument, TensorArgument, TensorArgument, float>;
// base, y, z.
using Out = std::tuple<TensorArgument, TensorArgument, TensorArgument>;
// dy, z, dx, whether it is added to, da, db.
using Gradients = std::tuple<TensorArgument, TensorArgument, TensorArgument, bool, TensorArgument,
                             TensorArgument>;

Shape shape_of(const Sizes& sizes) {
    const auto& [m, k, n, r] = sizes;
    return {m, k, n, r};
}

WeightOperand first_of(Tensor w) { return {w.data, w.strides[1], w.strides[2], w.is_float()}; }

// As fill of bind_ops.cpp.
template <typename Call>
bool fill(Call& call, Tensor x, const Weights3& weights, const GroupValues& values, Tensor seed,
          int threshold, Tensor workspace, int device, uintptr_t stream) {
    const auto& [a, b, activation] = weights;
    const auto& [ends, ranks, alpha_t, scaling, number] = values;
    if (!x.is_readable() || !a.is_weight_for(x) || !b.is_weight_for(x))
        return false;
    fill_branch(call, x, seed, threshold, workspace, device, stream);
    call.shape = Shape(x.sizes[0], static_cast<int>(x.sizes[1]), static_cast<int>(b.sizes[1]),
                       static_cast<int>(a.sizes[1]));
    call.members[0] = {first_of(a), first_of(b), alpha_t.pointer<float>(), activation, number};
    Groups& groups = call.groups;
    groups.count = static_cast<int>(a.sizes[0]);
    groups.ends = ends.pointer<int32_t>();
    groups.ranks = ranks.pointer<int32_t>();
    groups.scaling = scaling.pointer<float>();
    groups.ends_stride = ends.strides[0];
    groups.ranks_stride = ranks.strides[0];
    groups.scaling_stride = scaling.strides[0];
    groups.alpha_stride = alpha_t.strides[0];
    groups.a_stride = a.strides[0];
    groups.b_stride = b.strides[0];
    return true;
}

bool bound_forward(Tensor x, const Weights3& weights, const GroupValues& values, const Out& out,
                   Tensor seed, int threshold, Tensor workspace, int device, uintptr_t stream) {
    const auto& [base, y, z] = out;
    const DeviceScope scope(device);
    RaggedForwardCall call{};
    if (!fill(call, x, weights, values, seed, threshold, workspace, device, stream) ||
        !fill_output(call.outputs[0], base, y, z))
        return false;
    ragged_forward(call);
    return true;
}

bool bound_backward(Tensor x, const Weights3& weights, const GroupValues& values,
                    const Gradients& gradients, Tensor seed, int threshold, Tensor workspace,
                    int device, uintptr_t stream) {
    const auto& [dy, z, dx, adds_dx, da, db] = gradients;
    const DeviceScope scope(device);
    RaggedBackwardCall call{};
    if (!fill(call, x, weights, values, seed, threshold, workspace, device, stream) ||
        !fill_gradients(call.gradients[0], dy, z, da, db))
        return false;
    if (adds_dx && !dx.is_packed())
        throw std::invalid_argument("dx: expected packed rows that start at 16 bytes");
    call.dx = dx.data;
    call.adds_dx = adds_dx;
    ragged_backward(call);
    return true;
}

}  // namespace

void bind_ragged_ops(py::module_& module) {
    module.def("ragged_forward_workspace", [](const Sizes& sizes, int groups) {
        return ragged_forward_workspace(shape_of(sizes), groups);
    });
    module.def("ragged_backward_workspace", [](const Sizes& sizes, int groups, bool recompute_z) {
        return ragged_backward_workspace(shape_of(sizes), groups, recompute_z);
    });
    module.def("ragged_forward", &bound_forward, py::call_guard<py::gil_scoped_release>(),
               "As forward, of rows sorted by group.");
    module.def("ragged_backward", &bound_backward, py::call_guard<py::gil_scoped_release>(),
               "As ragged_forward.");
    module.def(
        "ragged_kernels",
        [](const Sizes& sizes, int groups, int sm_count, int shared_per_block, int shared_per_sm,
           bool rounded) {
            const DeviceLimits device{sm_count, shared_per_block, shared_per_sm};
            const Weights weights = rounded ? Weights::rounded : Weights::as_they_are;
            std::vector<py::dict> rows;
            for (const KernelPlan& plan :
                 ragged_kernels_of(shape_of(sizes), groups, weights, device))
                rows.push_back(described(plan, device));
            return rows;
        },
        py::arg("sizes"), py::arg("groups"), py::arg("sm_count"), py::arg("shared_per_block"),
        py::arg("shared_per_sm"), py::arg("rounded") = false,
        "The kernels of a ragged forward and backward, as launch_plan has those of a lone call.");
}

}  // namespace afa
