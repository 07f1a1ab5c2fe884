// The Python face of ops.h.
#include "python/cuda_ops.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <variant>

#include "cuda/host/device.h"
#include "cuda/host/ops.h"
#include "python/cuda_tensor.h"

namespace afa {
namespace {

namespace py = pybind11;

// M, K, N, r; N and r are lists where layers share x.
using OneOrMore = std::variant<int, std::vector<int>>;
using Sizes = std::tuple<int64_t, int, OneOrMore, OneOrMore>;
using Tensor = const TensorArgument&;
// A, B, alpha_t, activation, scaling.
using Member = std::tuple<TensorArgument, TensorArgument, TensorArgument, int, float>;
// base, y, z.
using Out = std::tuple<TensorArgument, TensorArgument, TensorArgument>;
// dy, z, da, db.
using Gradients = std::tuple<TensorArgument, TensorArgument, TensorArgument, TensorArgument>;

Shape shape_of(const Sizes& sizes) {
    const auto& [m, k, n, r] = sizes;
    if (const int* one = std::get_if<int>(&n))
        return {m, k, *one, std::get<int>(r)};
    const auto &widths = std::get<std::vector<int>>(n), &ranks = std::get<std::vector<int>>(r);
    if (widths.size() != ranks.size() || widths.empty() || widths.size() > kMaxMembers)
        throw std::invalid_argument("layers that share x: expected up to " +
                                    std::to_string(kMaxMembers) + " N and as many r");
    Shape shape;
    shape.m = m;
    shape.k = k;
    shape.count = static_cast<int>(widths.size());
    for (int i = 0; i < shape.count; ++i)
        shape.members[i] = {widths[i], ranks[i]};
    return shape;
}

// The part of a call that forward and backward share; false where an operand is not as the kernels
// read it.
bool fill(BranchCall& call, Tensor x, const std::vector<Member>& members, size_t results,
          Tensor seed, int threshold, Tensor workspace, int device, uintptr_t stream) {
    if (members.empty() || members.size() > kMaxMembers || results != members.size())
        throw std::invalid_argument(
            "expected 1 to " + std::to_string(kMaxMembers) + " members and as many results, got " +
            std::to_string(members.size()) + " and " + std::to_string(results));
    if (!x.is_readable())
        return false;
    fill_branch(call, x, seed, threshold, workspace, device, stream);
    call.shape.m = x.sizes[0];
    call.shape.k = static_cast<int>(x.sizes[1]);
    for (const auto& [a, b, alpha_t, activation, scaling] : members) {
        if (!a.is_weight_for(x) || !b.is_weight_for(x))
            return false;
        const int i = call.shape.count++;
        call.shape.members[i] = {static_cast<int>(b.sizes[0]), static_cast<int>(a.sizes[0])};
        call.members[i] = {a.weight(), b.weight(), alpha_t.pointer<float>(), activation, scaling};
    }
    return true;
}

bool bound_forward(Tensor x, const std::vector<Member>& members, const std::vector<Out>& outs,
                   Tensor seed, int threshold, Tensor workspace, int device, uintptr_t stream) {
    ForwardCall call{};
    const DeviceScope scope(device);
    if (!fill(call, x, members, outs.size(), seed, threshold, workspace, device, stream))
        return false;
    MemberOutput* output = call.outputs;
    for (const auto& [base, y, z] : outs) {
        if (!fill_output(*output++, base, y, z))
            return false;
    }
    forward(call);
    return true;
}

bool bound_backward(Tensor x, const std::vector<Member>& members, Tensor dx,
                    const std::vector<Gradients>& gradients, Tensor seed, int threshold,
                    Tensor workspace, int device, uintptr_t stream) {
    BackwardCall call{};
    const DeviceScope scope(device);
    if (!fill(call, x, members, gradients.size(), seed, threshold, workspace, device, stream))
        return false;
    call.dx = dx.data;
    MemberGradients* gradient = call.gradients;
    for (const auto& [dy, z, da, db] : gradients) {
        if (!fill_gradients(*gradient++, dy, z, da, db))
            return false;
    }
    backward(call);
    return true;
}

// A kernel with its launch parameters, for ``plan``.
py::dict described(const KernelPlan& plan, const DeviceLimits& device) {
    py::dict row;
    row["kernel"] = plan.kernel;
    row["grid"] = py::make_tuple(plan.grid_x, plan.grid_y);
    row["threads"] = plan.threads;
    row["stages"] = plan.stages;
    row["stage_bytes"] = plan.stage_bytes;
    row["shared_bytes"] = plan.shared_bytes;
    row["registers"] = plan.registers;
    row["tile_bytes"] = plan.tile_bytes;
    row["blocks_per_sm"] = plan.blocks_per_sm;
    row["waves"] = waves(plan, device);
    row["busy"] = 1 - tail(plan, device);
    row["launches"] = plan.launches;
    return row;
}

std::vector<py::dict> launch_plan(const Sizes& sizes, int sm_count, int shared_per_block,
                                  int shared_per_sm) {
    const DeviceLimits device{sm_count, shared_per_block, shared_per_sm};
    std::vector<py::dict> rows;
    for (const KernelPlan& plan : kernels_of(shape_of(sizes), device))
        rows.push_back(described(plan, device));
    return rows;
}

}  // namespace

void bind_ops(py::module_& module) {
    module.attr("MAX_RANK") = kMaxRank;
    module.attr("MAX_MEMBERS") = kMaxMembers;
    module.attr("MAX_MEMBER_RANK") = kMaxMemberRank;
    module.def("forward_workspace",
               [](const Sizes& sizes) { return forward_workspace(shape_of(sizes)); });
    module.def("backward_workspace",
               [](const Sizes& sizes) { return backward_workspace(shape_of(sizes)); });
    module.def("use_torch", &use_torch, "Learn torch's types, before forward and backward.");
    module.def("forward", &bound_forward, py::call_guard<py::gil_scoped_release>(),
               "Returns False, and does nothing, where an operand is not as the kernels read it.");
    module.def("backward", &bound_backward, py::call_guard<py::gil_scoped_release>(),
               "As forward.");
    module.def("launch_plan", &launch_plan, py::arg("sizes"), py::arg("sm_count"),
               py::arg("shared_per_block"), py::arg("shared_per_sm"),
               "The kernels of a forward and a backward, in order, small ones aside.");
    module.def(
        "primitive_check",
        [](int dtype, uintptr_t in, uintptr_t values, uintptr_t out, int device, uintptr_t stream) {
            const DeviceScope scope(device);
            launch_primitive_check(static_cast<DType>(dtype), reinterpret_cast<void*>(in),
                                   reinterpret_cast<float*>(values),
                                   reinterpret_cast<uint32_t*>(out),
                                   reinterpret_cast<void*>(stream));
        },
        "One warp runs every primitive once (csrc/cuda/kernels/prim_check.cuh).");
    module.def("device_limits", [](int device) {
        const DeviceLimits limits = device_limits(device);
        return py::make_tuple(limits.sm_count, limits.shared_per_block, limits.shared_per_sm);
    });
}

}  // namespace afa
