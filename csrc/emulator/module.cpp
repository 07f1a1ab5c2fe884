// afa_kernels._emulator: the CUDA kernels, executed on the CPU. For tests; not part of a wheel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator/device.h"
#include "emulator/simt.h"
#include "python/cuda_ops.h"

namespace py = pybind11;

namespace {

void set_options(const std::string& schedule, uint64_t seed) {
    const char* names[] = {"random", "warp_priority", "ascending", "descending"};
    for (int i = 0; i < 4; ++i)
        if (schedule == names[i])
            return simt::set_options({static_cast<simt::Schedule>(i), seed});
    throw py::value_error(
        "schedule: expected random, warp_priority, ascending or descending, got '" + schedule +
        "'");
}

py::dict counters() {
    const simt::Counters c = simt::counters();
    py::dict d;
    d["launches"] = c.launches;
    d["global_read_bytes"] = c.global_read_bytes;
    d["global_write_bytes"] = c.global_write_bytes;
    d["async_copy_bytes"] = c.async_copy_bytes;
    d["multiply_adds"] = c.multiply_adds;
    d["matrix_loads"] = c.matrix_loads;
    d["bank_conflicts"] = c.bank_conflicts;
    d["block_barriers"] = c.block_barriers;
    return d;
}

}  // namespace

PYBIND11_MODULE(_emulator, module) {
    module.doc() = "The CUDA kernels' source, executed on the CPU by a SIMT emulator.";
    afa::bind_ops(module);
    module.def("set_options", &set_options, py::arg("schedule"), py::arg("seed"));
    module.def(
        "set_device_limits",
        [](int sm_count, int shared_per_block, int shared_per_sm, int chunk_limit,
           int round_limit) {
            afa::set_emulated_device(
                {sm_count, shared_per_block, shared_per_sm, chunk_limit, round_limit});
        },
        py::arg("sm_count"), py::arg("shared_per_block"), py::arg("shared_per_sm"),
        py::arg("chunk_limit") = 0, py::arg("round_limit") = 0);
    module.def("counters", &counters);
    module.def("reset_counters", &simt::reset_counters);
}
