// afa_kernels._cuda_on_ptx: the compiled CUDA backend with the PTX machine for its GPUs. For tests;
// not part of a wheel.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ptx_machine/counters.h"
#include "ptx_machine/cuda/images.h"
#include "ptx_machine/cuda/runtime.h"
#include "python/cuda_device.h"
#include "python/cuda_ops.h"

namespace py = pybind11;

namespace {

using ptx::runtime_state;

py::dict describe(const ptx::LaunchRecord& record) {
    py::dict d = ptx::counters_dict(record.counters);
    d["kernel"] = record.kernel;
    d["device"] = record.device;
    d["grid"] = py::make_tuple(record.grid[0], record.grid[1], record.grid[2]);
    d["block"] = py::make_tuple(record.block[0], record.block[1], record.block[2]);
    d["shared_bytes"] = record.shared_bytes;
    d["granted"] = record.granted;
    d["carveout"] = record.carveout;
    d["overlaps"] = record.overlaps;
    return d;
}

py::list take_launches() {
    py::list all;
    for (const ptx::LaunchRecord& record : runtime_state().launches)
        all.append(describe(record));
    runtime_state().launches.clear();
    return all;
}

int add_device(int major, int minor, int multiprocessors, int shared_per_block,
               int shared_per_multiprocessor) {
    runtime_state().devices.push_back(
        {major, minor, multiprocessors, shared_per_block, shared_per_multiprocessor});
    return static_cast<int>(runtime_state().devices.size()) - 1;
}

void fail(const std::string& function, const std::string& error) {
    runtime_state().faults.calls[function] = ptx::error_of(error);
}

// A captured stream, to be run again and again.
struct Graph {
    std::vector<ptx::CapturedLaunch> launches;
};

void begin_capture(uintptr_t stream) {
    ptx::Capture& capture = runtime_state().capture;
    capture = {};
    capture.running = true;
    capture.stream = reinterpret_cast<cudaStream_t>(stream);
}

Graph end_capture() {
    ptx::Capture capture = std::move(runtime_state().capture);
    runtime_state().capture = {};
    if (!capture.running || capture.invalidated)
        throw std::runtime_error("no capture, or one that a launch has invalidated");
    return {std::move(capture.launches)};
}

void replay(const Graph& graph) {
    const cudaError_t error = ptx::replay(graph.launches);
    if (error != cudaSuccess)
        throw std::runtime_error(runtime_state().message);
}

void bind_runtime(py::module_& m) {
    m.doc() = "What the simulated CUDA runtime plays, and what it has seen.";
    m.def("restart", &ptx::restart, "Forgets all faults and contexts; devices and launches stay.");
    m.def("add_device", &add_device, py::arg("major"), py::arg("minor"),
          py::arg("multiprocessors") = 108, py::arg("shared_per_block") = 163 << 10,
          py::arg("shared_per_multiprocessor") = 164 << 10, "Returns the index of a new device.");
    m.def(
        "set_limits",
        [](int chunks, int rounds) {
            runtime_state().chunk_limit = chunks;
            runtime_state().round_limit = rounds;
        },
        py::arg("chunk_limit") = 0, py::arg("round_limit") = 0,
        "The most chunks of rows, and the most rows of a round, that a call is cut into; 0: any.");
    m.def("install_driver", [](int version, bool too_old) {
        runtime_state().faults.driver_version = version;
        runtime_state().faults.driver_is_too_old = too_old;
    });
    m.def(
        "set_idle", [](bool on) { runtime_state().idle = on; },
        "Lets launches be counted and do nothing, to time the code that launches.");
    m.def("idle_launches", [] { return runtime_state().idle_launches; });
    m.def("install_runtime", [](int version) { runtime_state().faults.runtime_version = version; });
    m.def(
        "set_overlaps", [](bool on) { runtime_state().faults.overlaps = on; },
        "Whether the device starts a launch before the one before it has ended.");
    m.def("fail", &fail, py::arg("function"), py::arg("error"), "Lets calls of a function fail.");
    m.def("succeed", [](const std::string& f) { runtime_state().faults.calls.erase(f); });
    m.def("calls", [](const std::string& f) { return runtime_state().calls[f]; });
    m.def("set_asynchronous", [](bool on) { runtime_state().faults.asynchronous = on; });
    m.def("last_error", [] { return ptx::error_name(runtime_state().last); });
    m.def("set_last_error",
          [](const std::string& name) { runtime_state().last = ptx::error_of(name); });
    m.def("current_device", [] { return runtime_state().current; }, "-1: no context is current.");
    m.def("set_current_device", [](int device) {
        runtime_state().current = device;
        if (device >= 0)
            runtime_state().contexts.insert(device);
    });
    m.def("contexts", [] { return runtime_state().contexts; });
    py::class_<Graph>(m, "Graph").def("replay", &replay).def("__len__", [](const Graph& g) {
        return g.launches.size();
    });
    m.def("begin_capture", &begin_capture, py::arg("stream"));
    m.def("end_capture", &end_capture);
}

}  // namespace

PYBIND11_MODULE(_cuda_on_ptx, m) {
    m.doc() = "The CUDA kernels' PTX, launched by the wheel's own host code on the PTX machine.";
    afa::bind_ops(m);
    afa::bind_device(m);
    py::module_ runtime = m.def_submodule("runtime");
    bind_runtime(runtime);
    m.def("kernel_names", &ptx::kernel_names);
    m.def("set_seed", [](uint64_t seed) { runtime_state().seed = seed; });
    m.def(
        "set_explain", [](bool on) { runtime_state().explain = on; },
        "Whether launches find the synchronizations that they need.");
    m.def("leave_unfilled", [](const std::string& kernel, uint32_t line) {
        runtime_state().unfilled_kernel = kernel;
        runtime_state().unfilled_line = line;
    });
    m.def("take_launches", &take_launches);
    m.def("set_edit", [](std::function<std::string(const std::string&)> edit) {
        ptx::images().edit = std::move(edit);
        ptx::forget_modules();
    });
    // A static function object may not outlive the interpreter.
    py::module_::import("atexit").attr("register")(
        py::cpp_function([] { ptx::images().edit = nullptr; }));
}
