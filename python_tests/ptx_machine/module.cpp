// afa_kernels._ptx: PTX, executed on the CPU. For tests; not part of a wheel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ptx_machine/counters.h"
#include "ptx_machine/machine.h"

namespace py = pybind11;

namespace {

py::dict describe(const ptx::KernelInfo& info) {
    py::list parameters;
    for (const ptx::Parameter& p : info.parameters) {
        py::dict d;
        d["name"] = p.name;
        d["offset"] = p.offset;
        d["bytes"] = p.bytes;
        d["alignment"] = p.alignment;
        parameters.append(d);
    }
    py::dict d;
    d["parameters"] = parameters;
    d["parameter_bytes"] = info.parameter_bytes;
    d["static_shared_bytes"] = info.static_shared_bytes;
    d["required_threads"] = info.required_threads;
    d["max_threads"] = info.max_threads;
    return d;
}

using Triple = std::array<uint32_t, 3>;
using Region = std::tuple<uint64_t, uint64_t, bool, std::string>;

py::dict launch(const ptx::Module& module, const std::string& kernel, const Triple& grid,
                const Triple& block, const py::bytes& parameters, uint32_t dynamic_shared,
                const std::vector<Region>& allocations, uint64_t seed, bool explain,
                uint32_t unfilled_line, bool overlaps) {
    ptx::Launch l;
    l.kernel = kernel;
    for (size_t k = 0; k < 3; ++k) {
        l.grid[k] = grid[k];
        l.block[k] = block[k];
    }
    const std::string bytes = parameters;
    l.parameters.assign(bytes.begin(), bytes.end());
    l.dynamic_shared_bytes = dynamic_shared;
    for (const auto& [address, size, writable, name] : allocations)
        l.allocations.push_back({address, size, writable, name});
    l.seed = seed;
    l.explain = explain;
    l.unfilled_line = unfilled_line;
    l.overlaps = overlaps;
    ptx::Counters counters;
    {
        const py::gil_scoped_release released;
        counters = module.launch(l);
    }
    return ptx::counters_dict(counters);
}

}  // namespace

PYBIND11_MODULE(_ptx, m) {
    m.doc() = "Executes PTX on the CPU and reports what hardware would leave undefined.";
    py::register_exception<ptx::LoadError>(m, "LoadError", PyExc_RuntimeError);
    py::register_exception<ptx::ExecutionError>(m, "ExecutionError", PyExc_RuntimeError);
    m.def("instruction_names", &ptx::instruction_names);
    py::class_<ptx::Module>(m, "Module")
        .def(py::init<const std::string&>(), py::arg("text"))
        .def_property_readonly("target", &ptx::Module::target)
        .def("kernels",
             [](const ptx::Module& module) {
                 py::dict all;
                 for (const ptx::KernelInfo& info : module.kernels())
                     all[py::str(info.name)] = describe(info);
                 return all;
             })
        .def("launch", &launch, py::arg("kernel"), py::arg("grid"), py::arg("block"),
             py::arg("parameters"), py::arg("dynamic_shared") = 0,
             py::arg("allocations") = std::vector<Region>(), py::arg("seed") = 0,
             py::arg("explain") = false, py::arg("unfilled_line") = 0, py::arg("overlaps") = false,
             "Runs a grid. allocations: (address, bytes, writable, name) of the global memory that "
             "it may touch. overlaps: it may start before the kernel before it has ended.");
}
