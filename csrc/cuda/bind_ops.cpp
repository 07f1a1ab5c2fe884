// The Python face of ops.h, for both modules that have one: afa_kernels._C (device) and
// afa_kernels._emulator.
#include "cuda/bind_ops.h"

#include <pybind11/stl.h>

#include "cuda/bind_tensor.h"
#include "cuda/ops.h"

namespace afa {
namespace {

namespace py = pybind11;

using Tensor = const TensorArgument&;
using Sizes = std::tuple<int64_t, int, int, int>;  // M, K, N, r

Shape shape_of(const Sizes& sizes) {
    return {std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes), std::get<3>(sizes)};
}

bool is_weight(Tensor w, Tensor x) { return w.element == x.element || w.is_float(); }

// The part of a call that forward and backward share; false where an operand is not as the kernels
// read it.
bool fill(BranchCall& call, Tensor x, Tensor a, Tensor b, Tensor alpha_t, Tensor seed,
          int activation, int threshold, float scaling, Tensor workspace, int device,
          uintptr_t stream) {
    if (!x.is_readable() || !is_weight(a, x) || !is_weight(b, x))
        return false;
    call.dtype = x.element == Element::bf16 ? DType::bf16 : DType::fp16;
    call.shape = {x.sizes[0], static_cast<int>(x.sizes[1]), static_cast<int>(b.sizes[0]),
                  static_cast<int>(a.sizes[0])};
    call.x = x.data;
    call.x_stride = x.strides[0];
    call.a = a.weight();
    call.b = b.weight();
    call.alpha_t = alpha_t.pointer<float>();
    call.seed = seed.pointer<int64_t>();
    call.activation = activation;
    call.threshold = threshold;
    call.scaling = scaling;
    call.workspace = workspace.data;
    call.stream = reinterpret_cast<void*>(stream);
    call.device = device_limits(device);
    return true;
}

bool bound_forward(Tensor x, Tensor a, Tensor b, Tensor base, Tensor y, Tensor z, Tensor alpha_t,
                   Tensor seed, int activation, int threshold, float scaling, Tensor workspace,
                   int device, uintptr_t stream) {
    ForwardCall call{};
    const DeviceScope scope(device);
    if (!y.is_readable() || (base.present && !base.is_readable()) ||
        !fill(call, x, a, b, alpha_t, seed, activation, threshold, scaling, workspace, device,
              stream))
        return false;
    call.base = base.data;
    call.base_stride = base.strides[0];
    call.y = y.data;
    call.y_stride = y.strides[0];
    call.z = z.data;
    forward(call);
    return true;
}

bool bound_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor z, Tensor dx, Tensor da,
                    Tensor db, Tensor alpha_t, Tensor seed, int activation, int threshold,
                    float scaling, Tensor workspace, int device, uintptr_t stream) {
    BackwardCall call{};
    const DeviceScope scope(device);
    if (!dy.is_readable() || (z.present && !z.is_readable_z()) ||
        !fill(call, x, a, b, alpha_t, seed, activation, threshold, scaling, workspace, device,
              stream))
        return false;
    call.dy = dy.data;
    call.dy_stride = dy.strides[0];
    call.z = z.data;
    call.dx = dx.data;
    call.da = da.data;
    call.da_is_float = da.is_float();
    call.db = db.data;
    call.db_is_float = db.is_float();
    backward(call);
    return true;
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
    module.def("use_torch", &use_torch, "Learn torch's types, before forward and backward.");
    module.def("forward", &bound_forward, py::call_guard<py::gil_scoped_release>(),
               "Returns False, and does nothing, where an operand is not as the kernels read it.");
    module.def("backward", &bound_backward, py::call_guard<py::gil_scoped_release>(),
               "As forward.");
    module.def("launch_plan", &launch_plan, py::arg("sizes"), py::arg("sm_count"),
               py::arg("shared_per_block"), py::arg("shared_per_sm"),
               "The kernels of a forward and a backward, in order.");
    module.def(
        "primitive_check",
        [](int dtype, uintptr_t in, uintptr_t values, uintptr_t out, int device, uintptr_t stream) {
            const DeviceScope scope(device);
            launch_primitive_check(static_cast<DType>(dtype), reinterpret_cast<void*>(in),
                                   reinterpret_cast<float*>(values),
                                   reinterpret_cast<uint32_t*>(out),
                                   reinterpret_cast<void*>(stream));
        },
        "One warp runs every primitive once (csrc/cuda/prim_check.cuh).");
    module.def("device_limits", [](int device) {
        const DeviceLimits limits = device_limits(device);
        return py::make_tuple(limits.sm_count, limits.shared_per_block, limits.shared_per_sm);
    });
}

}  // namespace afa
