// The Python module afa_kernels._C: integers in, launchers called. It knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/activation.h"
#include "common/philox.h"
#include "cpu/cpu.h"

namespace py = pybind11;

#if defined(AFA_WITH_CUDA)
void bind_cuda(py::module_& module);  // csrc/cuda/bindings.cpp
#endif

namespace {

py::dict build_info() {
    py::dict info;
    info["compiler"] = __VERSION__;
#if defined(_OPENMP)
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = py::none();
#endif
#if defined(AFA_WITH_CUDA)
    info["cuda"] = AFA_CUDA_VERSION;
    info["cuda_architectures"] = AFA_CUDA_ARCHITECTURES;
#else
    info["cuda"] = py::none();
#endif
    return info;
}

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const afa::cpu::Isa isa : afa::cpu::available_isas())
        names.push_back(afa::cpu::isa_name(isa));
    return names;
}

py::dict activation_ids() {
    using afa::Activation;
    py::dict ids;
    const auto add = [&](const char* name, Activation act) { ids[name] = static_cast<int>(act); };
    add("relu", Activation::relu);
    add("silu", Activation::silu);
    add("gelu", Activation::gelu);
    add("gelu_tanh", Activation::gelu_tanh);
    add("leaky_relu", Activation::leaky_relu);
    add("tanh", Activation::tanh);
    add("sin", Activation::sin);
    return ids;
}

// Writes one byte per element: 1 where dropout keeps it.
void dropout_mask(uintptr_t out, int64_t rows, int64_t cols, int64_t seed, int threshold) {
    auto* mask = reinterpret_cast<uint8_t*>(out);
    const int64_t calls = (cols + afa::kDropoutColumns - 1) / afa::kDropoutColumns;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < cols; ++col) {
            const int64_t group = col / afa::kDropoutColumns;
            const afa::Philox4 bytes =
                afa::dropout_bytes(static_cast<uint64_t>(seed), row, calls, group);
            const int j = static_cast<int>(col % afa::kDropoutColumns);
            mask[row * cols + col] = afa::dropout_keeps(bytes, j, threshold);
        }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels: raw pointers, sizes, strides and dtypes as integers.";
    module.def("build_info", &build_info, "Compiler, OpenMP and CUDA of this build.");
    module.def("cpu_isas", &cpu_isas, "Instruction sets that build and machine have, best last.");
    module.def(
        "cpu_isa", [] { return std::string(afa::cpu::isa_name(afa::cpu::selected_isa())); },
        "The instruction set in use; ValueError if AFA_CPU_ISA names an impossible one.");
    module.def("cpu_features", &afa::cpu::machine_features, "Vector features of this machine.");
    module.def("activation_ids", &activation_ids, "Name -> id of every activation.");
    module.def("dropout_mask", &dropout_mask, py::arg("out"), py::arg("rows"), py::arg("cols"),
               py::arg("seed"), py::arg("threshold"), "Write the keep mask as bytes (for tests).");
#if defined(AFA_WITH_CUDA)
    bind_cuda(module);
#endif
}
