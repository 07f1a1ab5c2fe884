// The Python module afa_kernels._C: checks what Python hands over and calls the kernels. It is
// built without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/activation.h"
#include "common/philox.h"
#include "cpu/cpu.h"
#include "python/checks.h"
#include "python/cpu_operands.h"

namespace py = pybind11;

void bind_by_owner(py::module_& module);  // cpu_by_owner.cpp
#if defined(AFA_WITH_CUDA)
void bind_cuda(py::module_& module);  // cuda.cpp
#endif

namespace {

using afa::cpu::common;
using afa::cpu::dense;
using afa::cpu::matrix;
using afa::cpu::scalar;
using afa::cpu::set_dx;

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
    py::dict ids;
    for (int id = 0; id < afa::kActivationCount; ++id)
        ids[afa::kActivationNames[id]] = id;
    return ids;
}

// What a member is in both directions: A, B, and the sizes that follow.
template <class Member>
Member member_of(const afa::cpu::CommonParams& p, py::handle a, py::handle b, py::handle alpha_t,
                 int activation, float scaling) {
    if (activation < 0 || activation >= afa::kActivationCount)
        throw std::invalid_argument("activation: unknown id");
    const afa::TensorView view = afa::view_of(b, "lora_b");
    Member one;
    one.n = view.sizes[0];
    one.r = view.sizes[1];
    if (one.n < 1 || one.r < 1 || one.r > afa::cpu::kMaxRank)
        throw std::invalid_argument("sizes: expected N >= 1 and 1 <= r <= 256");
    one.a = matrix(afa::view_of(a, "lora_a"), "lora_a", one.r, p.k);
    one.b = matrix(view, "lora_b", one.n, one.r);
    if (activation != static_cast<int>(afa::Activation::identity))
        one.alpha_t = scalar<float>(alpha_t, "alpha_t", afa::Element::f32);
    one.activation = activation;
    one.scaling = scaling;
    return one;
}

void set_results(const afa::cpu::CommonParams& p, afa::cpu::ForwardMember& one, py::handle base,
                 py::handle out, py::handle z) {
    one.base = matrix(base, "base", p.m, one.n, p.dtype);
    one.out = matrix(out, "out", p.m, one.n, p.dtype);
    one.z = dense(z, "z", p.m, one.r, p.dtype);
    if (one.out.data == nullptr)
        throw py::type_error("out: expected a torch.Tensor, got None");
}

void set_results(const afa::cpu::CommonParams& p, afa::cpu::BackwardMember& one, py::handle dy,
                 py::handle z, py::handle da, py::handle db) {
    one.dy = matrix(dy, "dy", p.m, one.n, p.dtype);
    one.z = dense(z, "z", p.m, one.r, p.dtype);
    one.da = dense(da, "da", one.r, p.k, one.a.dtype);
    one.db = dense(db, "db", one.n, one.r, one.b.dtype);
    if (one.dy.data == nullptr)
        throw py::type_error("dy: expected a torch.Tensor, got None");
    if (one.z.data == nullptr)
        throw py::type_error("z: expected a torch.Tensor, got None");
}

// base and z may be None. out may be base.
void cpu_forward(py::handle x, py::handle a, py::handle b, py::handle alpha_t, py::handle seed,
                 int activation, int dropout, float scaling, int threads, py::handle base,
                 py::handle out, py::handle z) {
    auto p = common<afa::cpu::ForwardParams>(x, seed, dropout, threads);
    auto one = member_of<afa::cpu::ForwardMember>(p, a, b, alpha_t, activation, scaling);
    set_results(p, one, base, out, z);
    p.members = &one;
    p.count = 1;
    const py::gil_scoped_release unlocked;
    afa::cpu::forward(p);
}

// z, dx, da and db are contiguous; dx, da and db may be None: not wanted.
void cpu_backward(py::handle x, py::handle a, py::handle b, py::handle alpha_t, py::handle seed,
                  int activation, int dropout, float scaling, int threads, py::handle dy,
                  py::handle z, py::handle dx, py::handle da, py::handle db, bool accumulate_dx) {
    auto p = common<afa::cpu::BackwardParams>(x, seed, dropout, threads);
    auto one = member_of<afa::cpu::BackwardMember>(p, a, b, alpha_t, activation, scaling);
    set_results(p, one, dy, z, da, db);
    set_dx(p, dx, accumulate_dx);
    p.members = &one;
    p.count = 1;
    const py::gil_scoped_release unlocked;
    afa::cpu::backward(p);
}

// The members on one x, from a tuple (a, b, alpha_t, activation, scaling, ...) for each: the
// fields of member_of, then those of set_results.
template <class Member, size_t kFields>
std::vector<Member> members_of(const afa::cpu::CommonParams& p, const py::tuple& tuples) {
    std::vector<Member> members;
    members.reserve(tuples.size());
    int64_t ranks = 0;
    for (const py::handle fields : tuples) {
        if (!PyTuple_Check(fields.ptr()) || PyTuple_GET_SIZE(fields.ptr()) != kFields)
            throw py::type_error("members: expected tuples of " + std::to_string(kFields));
        const auto field = [&](py::ssize_t i) {
            return py::handle(PyTuple_GET_ITEM(fields.ptr(), i));
        };
        members.push_back(member_of<Member>(p, field(0), field(1), field(2),
                                            py::cast<int>(field(3)), py::cast<float>(field(4))));
        if constexpr (kFields == 8)
            set_results(p, members.back(), field(5), field(6), field(7));
        else
            set_results(p, members.back(), field(5), field(6), field(7), field(8));
        ranks += members.back().r;
    }
    if (members.empty() || ranks > afa::cpu::kMaxRank)
        throw std::invalid_argument(
            "members: expected at least one, and ranks of at most 256 together");
    return members;
}

// Members: (a, b, alpha_t, activation, scaling, base, out, z).
void cpu_shared_forward(py::handle x, int threads, const py::tuple& tuples) {
    auto p = common<afa::cpu::ForwardParams>(x, py::none(), 0, threads);
    const auto members = members_of<afa::cpu::ForwardMember, 8>(p, tuples);
    p.members = members.data();
    p.count = static_cast<int64_t>(members.size());
    const py::gil_scoped_release unlocked;
    afa::cpu::forward(p);
}

// Members: (a, b, alpha_t, activation, scaling, dy, z, da, db).
void cpu_shared_backward(py::handle x, int threads, const py::tuple& tuples, py::handle dx,
                         bool accumulate_dx) {
    auto p = common<afa::cpu::BackwardParams>(x, py::none(), 0, threads);
    const auto members = members_of<afa::cpu::BackwardMember, 9>(p, tuples);
    set_dx(p, dx, accumulate_dx);
    p.members = members.data();
    p.count = static_cast<int64_t>(members.size());
    const py::gil_scoped_release unlocked;
    afa::cpu::backward(p);
}

// What a tensor looks like to the kernels (for tests): address, sizes, strides, element type.
py::tuple tensor_view(py::handle tensor, bool by_attributes) {
    const afa::TensorView view =
        by_attributes ? afa::view_by_attributes(tensor, "tensor") : afa::view_of(tensor, "tensor");
    py::list sizes, strides;
    for (int i = 0; i < view.dimensions; ++i) {
        sizes.append(view.sizes[i]);
        strides.append(view.strides[i]);
    }
    return py::make_tuple(reinterpret_cast<uintptr_t>(view.data), sizes, strides,
                          static_cast<int>(view.element));
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
    module.doc() = "Compiled kernels.";
    module.def("use_torch", &afa::use_torch, "Learn torch's types, before any other call.");
    module.def("has_exchange_table", &afa::has_exchange_table);
    module.def("tensor_view", &tensor_view, py::arg("tensor"), py::arg("by_attributes") = false);
    module.def("are_plain", &afa::are_plain);
    module.def("recognizes_lora", &afa::recognizes_lora);
    module.def("recognizes_linear", &afa::recognizes_linear);
    module.def("recognizes_shared", &afa::recognizes_shared);
    module.def(
        "float_at", [](py::handle t) { return *scalar<float>(t, "tensor", afa::Element::f32); },
        "The value of a 0-dim float32 CPU tensor.");
    module.def(
        "environment", [](const char* name) { return std::getenv(name); },
        "The environment variable of that name, or None.");
    module.def("build_info", &build_info, "Compiler, OpenMP and CUDA of this build.");
    // These three are cut to what AFA_CPU_ISA names; ValueError if it names an impossible one.
    module.def("cpu_isas", &cpu_isas, "Instruction sets that build and machine have, best last.");
    module.def(
        "cpu_isa", [] { return std::string(afa::cpu::isa_name(afa::cpu::selected_isa())); },
        "The instruction set in use, the best of them.");
    module.def("cpu_features", &afa::cpu::machine_features, "Vector features of this machine.");
    module.def("cpu_forward", &cpu_forward);
    module.def("cpu_backward", &cpu_backward);
    module.def("cpu_shared_forward", &cpu_shared_forward);
    module.def("cpu_shared_backward", &cpu_shared_backward);
    bind_by_owner(module);
    module.def("activation_ids", &activation_ids, "Name -> id of every activation.");
    module.def("dropout_mask", &dropout_mask, py::arg("out"), py::arg("rows"), py::arg("cols"),
               py::arg("seed"), py::arg("threshold"), "Write the keep mask as bytes (for tests).");
#if defined(AFA_WITH_CUDA)
    bind_cuda(module);
#endif
}
