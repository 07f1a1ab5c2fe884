// afa_kernels._cuda_on_ptx: the compiled CUDA backend with the PTX machine for a GPU. For tests;
// not part of a wheel.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/bind_ops.h"
#include "cuda/launch.h"
#include "ptx/counters.h"
#include "ptx/cuda/runtime.h"

namespace py = pybind11;

namespace {

py::dict describe(const ptx::LaunchRecord& record) {
    py::dict d = ptx::counters_dict(record.counters);
    d["kernel"] = record.kernel;
    d["grid"] = py::make_tuple(record.grid[0], record.grid[1], record.grid[2]);
    d["block"] = py::make_tuple(record.block[0], record.block[1], record.block[2]);
    d["shared_bytes"] = record.shared_bytes;
    return d;
}

}  // namespace

PYBIND11_MODULE(_cuda_on_ptx, m) {
    m.doc() = "The CUDA kernels' PTX, launched by the wheel's own host code on the PTX machine.";
    afa::bind_ops(m);
    m.def("kernel_names", &ptx::kernel_names);
    m.def("set_seed", [](uint64_t seed) { ptx::runtime_state().seed = seed; });
    m.def("take_launches", [] {
        py::list all;
        for (const ptx::LaunchRecord& record : ptx::runtime_state().launches)
            all.append(describe(record));
        ptx::runtime_state().launches.clear();
        return all;
    });
    m.def("set_edit", [](std::function<std::string(const std::string&)> edit) {
        ptx::runtime_state().edit = std::move(edit);
        ptx::forget_modules();
    });
    // A static function object may not outlive the interpreter.
    py::module_::import("atexit").attr("register")(
        py::cpp_function([] { ptx::runtime_state().edit = nullptr; }));
}
