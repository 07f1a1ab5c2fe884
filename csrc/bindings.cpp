// The Python module afa_kernels._C: integers in, launchers called. It knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>

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

afa::cpu::Matrix matrix(uintptr_t data, int64_t row_stride, int64_t col_stride, int dtype) {
    return {reinterpret_cast<void*>(data), row_stride, col_stride,
            static_cast<afa::cpu::Dtype>(dtype)};
}

void check_call(const afa::cpu::CommonParams& p) {
    if (p.m < 1 || p.k < 1 || p.n < 1 || p.r < 1 || p.r > 256)
        throw std::invalid_argument("sizes: expected M, K, N >= 1 and 1 <= r <= 256");
    if (p.dtype == afa::cpu::Dtype::f64)
        throw std::invalid_argument("dtype: the CPU kernels do not take float64");
    if (p.alpha_t == nullptr || (p.dropout > 0 && p.seed == nullptr))
        throw std::invalid_argument("alpha_t, seed: expected an address");
    if (p.activation < 0 || p.activation >= afa::kActivationCount)
        throw std::invalid_argument("activation: unknown id");
    if (p.dropout < 0 || p.dropout >= afa::kDropoutLevels)
        throw std::invalid_argument("dropout: expected 0..255");
}

template <class Params>
Params common(int64_t m, int64_t k, int64_t n, int64_t r, int dtype, uintptr_t alpha_t,
              uintptr_t seed, int activation, int dropout, float scaling, int threads) {
    Params p;
    p.m = m;
    p.k = k;
    p.n = n;
    p.r = r;
    p.dtype = static_cast<afa::cpu::Dtype>(dtype);
    p.alpha_t = reinterpret_cast<const float*>(alpha_t);
    p.seed = reinterpret_cast<const int64_t*>(seed);
    p.activation = activation;
    p.dropout = dropout;
    p.scaling = scaling;
    p.threads = threads < 1 ? 1 : threads;
    check_call(p);
    return p;
}

// Absent matrices have the address 0. Strides are in elements; dtypes as in cpu/params.h.
void cpu_forward(int64_t m, int64_t k, int64_t n, int64_t r, int dtype, uintptr_t alpha_t,
                 uintptr_t seed, int activation, int dropout, float scaling, int threads,
                 uintptr_t x, int64_t x_row, int64_t x_col, uintptr_t a, int64_t a_row,
                 int64_t a_col, int a_dtype, uintptr_t b, int64_t b_row, int64_t b_col, int b_dtype,
                 uintptr_t base, int64_t base_row, int64_t base_col, uintptr_t out, int64_t out_row,
                 int64_t out_col, uintptr_t z) {
    auto p = common<afa::cpu::ForwardParams>(m, k, n, r, dtype, alpha_t, seed, activation, dropout,
                                             scaling, threads);
    p.x = matrix(x, x_row, x_col, dtype);
    p.a = matrix(a, a_row, a_col, a_dtype);
    p.b = matrix(b, b_row, b_col, b_dtype);
    p.base = matrix(base, base_row, base_col, dtype);
    p.out = matrix(out, out_row, out_col, dtype);
    p.z = matrix(z, r, 1, dtype);
    const py::gil_scoped_release unlocked;
    afa::cpu::forward(p);
}

// As cpu_forward. z, dx, da and db are dense; a missing z is recomputed, missing gradients are not
// computed.
void cpu_backward(int64_t m, int64_t k, int64_t n, int64_t r, int dtype, uintptr_t alpha_t,
                  uintptr_t seed, int activation, int dropout, float scaling, int threads,
                  uintptr_t dy, int64_t dy_row, int64_t dy_col, uintptr_t x, int64_t x_row,
                  int64_t x_col, uintptr_t a, int64_t a_row, int64_t a_col, int a_dtype,
                  uintptr_t b, int64_t b_row, int64_t b_col, int b_dtype, uintptr_t z, uintptr_t dx,
                  uintptr_t da, uintptr_t db, bool accumulate_dx) {
    auto p = common<afa::cpu::BackwardParams>(m, k, n, r, dtype, alpha_t, seed, activation, dropout,
                                              scaling, threads);
    p.dy = matrix(dy, dy_row, dy_col, dtype);
    p.x = matrix(x, x_row, x_col, dtype);
    p.a = matrix(a, a_row, a_col, a_dtype);
    p.b = matrix(b, b_row, b_col, b_dtype);
    p.z = matrix(z, r, 1, dtype);
    p.dx = matrix(dx, k, 1, dtype);
    p.da = matrix(da, k, 1, a_dtype);
    p.db = matrix(db, r, 1, b_dtype);
    p.accumulate_dx = accumulate_dx;
    if (accumulate_dx && dropout > 0)
        throw std::invalid_argument("accumulate_dx: not with dropout");
    const py::gil_scoped_release unlocked;
    afa::cpu::backward(p);
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
    module.def("cpu_forward", &cpu_forward);
    module.def("cpu_backward", &cpu_backward);
    module.def("activation_ids", &activation_ids, "Name -> id of every activation.");
    module.def("dropout_mask", &dropout_mask, py::arg("out"), py::arg("rows"), py::arg("cols"),
               py::arg("seed"), py::arg("threshold"), "Write the keep mask as bytes (for tests).");
#if defined(AFA_WITH_CUDA)
    bind_cuda(module);
#endif
}
