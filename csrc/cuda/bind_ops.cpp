// The Python face of ops.h, for both modules that have one: afa_kernels._C (device) and
// afa_kernels._emulator.
#include "cuda/bind_ops.h"

#include <pybind11/stl.h>

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
using Sizes = std::tuple<int64_t, int, int, int>;   // M, K, N, r

Shape shape_of(const Sizes& sizes) {
    return {std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes), std::get<3>(sizes)};
}

WeightOperand operand_of(const Weight& w) {
    return {pointer(std::get<0>(w)), std::get<1>(w), std::get<2>(w), std::get<3>(w)};
}

// The part of a call that forward and backward share, in the order of the Python arguments.
void fill(BranchCall& call, int dtype, const Sizes& sizes, Matrix x, const Weight& a,
          const Weight& b, uintptr_t alpha_t, uintptr_t seed, int activation, int threshold,
          float scaling, uintptr_t workspace, int device, uintptr_t stream) {
    call.dtype = static_cast<DType>(dtype);
    call.shape = shape_of(sizes);
    call.x = pointer(x.first);
    call.x_stride = x.second;
    call.a = operand_of(a);
    call.b = operand_of(b);
    call.alpha_t = pointer<float>(alpha_t);
    call.seed = pointer<int64_t>(seed);
    call.activation = activation;
    call.threshold = threshold;
    call.scaling = scaling;
    call.workspace = pointer(workspace);
    call.stream = pointer(stream);
    call.device = device_limits(device);
}

void bound_forward(int dtype, const Sizes& sizes, Matrix x, const Weight& a, const Weight& b,
                   Matrix base, Matrix y, uintptr_t z, uintptr_t alpha_t, uintptr_t seed,
                   int activation, int threshold, float scaling, uintptr_t workspace, int device,
                   uintptr_t stream) {
    ForwardCall call{};
    const DeviceScope scope(device);
    fill(call, dtype, sizes, x, a, b, alpha_t, seed, activation, threshold, scaling, workspace,
         device, stream);
    call.base = pointer(base.first);
    call.base_stride = base.second;
    call.y = pointer(y.first);
    call.y_stride = y.second;
    call.z = pointer(z);
    forward(call);
}

void bound_backward(int dtype, const Sizes& sizes, Matrix x, const Weight& a, const Weight& b,
                    Matrix dy, uintptr_t z, uintptr_t dx, std::pair<uintptr_t, bool> da,
                    std::pair<uintptr_t, bool> db, uintptr_t alpha_t, uintptr_t seed,
                    int activation, int threshold, float scaling, uintptr_t workspace, int device,
                    uintptr_t stream) {
    BackwardCall call{};
    const DeviceScope scope(device);
    fill(call, dtype, sizes, x, a, b, alpha_t, seed, activation, threshold, scaling, workspace,
         device, stream);
    call.dy = pointer(dy.first);
    call.dy_stride = dy.second;
    call.z = pointer(z);
    call.dx = pointer(dx);
    call.da = pointer(da.first);
    call.da_is_float = da.second;
    call.db = pointer(db.first);
    call.db_is_float = db.second;
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
    module.def("forward_workspace",
               [](const Sizes& sizes) { return forward_workspace(shape_of(sizes)); });
    module.def("backward_workspace", [](const Sizes& sizes, bool recompute_z) {
        return backward_workspace(shape_of(sizes), recompute_z);
    });
    module.def("forward", &bound_forward, py::call_guard<py::gil_scoped_release>());
    module.def("backward", &bound_backward, py::call_guard<py::gil_scoped_release>());
    module.def("launch_plan", &launch_plan, py::arg("sizes"), py::arg("sm_count"),
               py::arg("shared_per_block"), py::arg("shared_per_sm"),
               "The kernels of a forward and a backward, in order.");
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
