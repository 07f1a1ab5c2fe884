// The Python face of ops.h, for both modules that have one: afa_kernels._C (device) and
// afa_kernels._emulator.
#include "cuda/bind_ops.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <variant>

#include "cuda/ops.h"

namespace afa {
namespace {

namespace py = pybind11;

template <typename T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Weight =
    std::tuple<uintptr_t, int64_t, int64_t, bool>;  // data, row stride, column stride, is float32
using Matrix = std::pair<uintptr_t, int64_t>;       // data, row stride
using Gradient = std::pair<uintptr_t, bool>;        // data, is float32
// M, K, N, r; N and r are lists where layers share x.
using OneOrMore = std::variant<int, std::vector<int>>;
using Sizes = std::tuple<int64_t, int, OneOrMore, OneOrMore>;
// A, B, alpha_t, activation, scaling.
using Member = std::tuple<Weight, Weight, uintptr_t, int, float>;
// base, y, z.
using Out = std::tuple<Matrix, Matrix, uintptr_t>;
// dy, z, da, db.
using Gradients = std::tuple<Matrix, uintptr_t, Gradient, Gradient>;

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

WeightOperand operand_of(const Weight& w) {
    return {pointer(std::get<0>(w)), std::get<1>(w), std::get<2>(w), std::get<3>(w)};
}

// The part of a call that forward and backward share, in the order of the Python arguments.
void fill(BranchCall& call, int dtype, const Sizes& sizes, Matrix x,
          const std::vector<Member>& members, size_t results, uintptr_t seed, int threshold,
          uintptr_t workspace, int device, uintptr_t stream) {
    call.dtype = static_cast<DType>(dtype);
    call.shape = shape_of(sizes);
    const size_t count = call.shape.count;
    if (members.size() != count || results != count)
        throw std::invalid_argument("expected " + std::to_string(count) + " members, got " +
                                    std::to_string(members.size()));
    call.x = pointer(x.first);
    call.x_stride = x.second;
    for (size_t i = 0; i < count; ++i) {
        const auto& [a, b, alpha_t, activation, scaling] = members[i];
        call.members[i] = {operand_of(a), operand_of(b), pointer<float>(alpha_t), activation,
                           scaling};
    }
    call.seed = pointer<int64_t>(seed);
    call.threshold = threshold;
    call.workspace = pointer(workspace);
    call.stream = pointer(stream);
    call.device = device_limits(device);
}

void bound_forward(int dtype, const Sizes& sizes, Matrix x, const std::vector<Member>& members,
                   const std::vector<Out>& outs, uintptr_t seed, int threshold, uintptr_t workspace,
                   int device, uintptr_t stream) {
    ForwardCall call{};
    const DeviceScope scope(device);
    fill(call, dtype, sizes, x, members, outs.size(), seed, threshold, workspace, device, stream);
    for (size_t i = 0; i < outs.size(); ++i) {
        const auto& [base, y, z] = outs[i];
        call.outputs[i] = {pointer(base.first), base.second, pointer(y.first), y.second,
                           pointer(z)};
    }
    forward(call);
}

void bound_backward(int dtype, const Sizes& sizes, Matrix x, const std::vector<Member>& members,
                    uintptr_t dx, const std::vector<Gradients>& gradients, uintptr_t seed,
                    int threshold, uintptr_t workspace, int device, uintptr_t stream) {
    BackwardCall call{};
    const DeviceScope scope(device);
    fill(call, dtype, sizes, x, members, gradients.size(), seed, threshold, workspace, device,
         stream);
    call.dx = pointer(dx);
    for (size_t i = 0; i < gradients.size(); ++i) {
        const auto& [dy, z, da, db] = gradients[i];
        call.gradients[i] = {pointer(dy.first), dy.second, pointer(z), pointer(da.first),
                             pointer(db.first), da.second, db.second};
    }
    backward(call);
}

py::dict described(const KernelPlan& plan, const DeviceLimits& device) {
    py::dict row;
    row["kernel"] = plan.kernel;
    row["grid"] = py::make_tuple(plan.grid_x, plan.grid_y);
    row["threads"] = plan.threads;
    row["stages"] = plan.stages;
    row["stage_bytes"] = plan.stage_bytes;
    row["shared_bytes"] = plan.shared_bytes;
    row["registers"] = plan.registers;
    row["blocks_per_sm"] = plan.blocks_per_sm;
    row["waves"] = waves(plan, device);
    row["launches"] = plan.launches;
    return row;
}

std::vector<py::dict> launch_plan(const Sizes& sizes, int sm_count, int shared_per_block,
                                  int shared_per_sm, bool rounded) {
    const DeviceLimits device{sm_count, shared_per_block, shared_per_sm};
    std::vector<py::dict> rows;
    const Weights weights = rounded ? Weights::rounded : Weights::as_they_are;
    for (const KernelPlan& plan : kernels_of(shape_of(sizes), weights, device))
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
    module.def("backward_workspace", [](const Sizes& sizes, bool recompute_z) {
        return backward_workspace(shape_of(sizes), recompute_z);
    });
    module.def("forward", &bound_forward, py::call_guard<py::gil_scoped_release>());
    module.def("backward", &bound_backward, py::call_guard<py::gil_scoped_release>());
    module.def("launch_plan", &launch_plan, py::arg("sizes"), py::arg("sm_count"),
               py::arg("shared_per_block"), py::arg("shared_per_sm"), py::arg("rounded") = false,
               "The kernels of a forward and a backward, in order; `rounded`: A or B is float32.");
    module.def(
        "primitive_check",
        [](int dtype, uintptr_t in, uintptr_t values, uintptr_t out, int device, uintptr_t stream) {
            const DeviceScope scope(device);
            launch_primitive_check(static_cast<DType>(dtype), pointer(in), pointer<float>(values),
                                   pointer<uint32_t>(out), pointer(stream));
        },
        "One warp runs every primitive once (csrc/cuda/prim_check.cuh).");
    module.def("device_limits", [](int device) {
        const DeviceLimits limits = device_limits(device);
        return py::make_tuple(limits.sm_count, limits.shared_per_block, limits.shared_per_sm);
    });
}

}  // namespace afa
