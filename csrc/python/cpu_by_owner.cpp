// The calls of the CPU kernels for rows by owner, bound to Python.
#include "common/activation.h"
#include "cpu/by_owner.h"
#include "python/cpu_operands.h"

namespace py = pybind11;

namespace afa::cpu {

namespace {

// (owners, rows, cols), of any strides.
Stack stack(const TensorView& view, const char* name, int64_t owners, int64_t rows, int64_t cols) {
    if (view.dimensions != 3 || view.sizes[0] != owners || view.sizes[1] != rows ||
        view.sizes[2] != cols)
        throw py::value_error(std::string(name) + ": expected shape (" + std::to_string(owners) +
                              ", " + std::to_string(rows) + ", " + std::to_string(cols) + ")");
    return {{data_of(view, name), view.strides[1], view.strides[2], dtype_of(view, name)},
            view.strides[0]};
}

// The gradient of a stack of factors, contiguous. None: absent.
Stack gradient(py::handle tensor, const char* name, int64_t owners, int64_t rows, int64_t cols,
               Dtype dtype) {
    if (tensor.is_none())
        return {};
    const Stack found = stack(view_of(tensor, name), name, owners, rows, cols);
    const Stack dense{{found.first.data, cols, 1, dtype}, rows * cols};
    const bool adjacent = (cols == 1 || found.first.col_stride == 1) &&
                          (rows == 1 || found.first.row_stride == dense.first.row_stride) &&
                          (owners == 1 || found.stride == dense.stride);
    if (!adjacent || found.first.dtype != dtype)
        throw py::value_error(std::string(name) +
                              ": expected a contiguous tensor in the dtype of its factor");
    return dense;
}

template <class T>
PerOwner<T> per_owner(py::handle tensor, const char* name, int64_t owners, Element element) {
    if (tensor.is_none())
        return {};
    const TensorView view = view_of(tensor, name);
    if (view.dimensions != 1 || view.sizes[0] != owners || view.element != element ||
        view.data == nullptr)
        throw py::value_error(std::string(name) + ": expected one " +
                              (element == Element::i32 ? "int32" : "float32") +
                              " for each of the " + std::to_string(owners) + " owners");
    return {static_cast<const T*>(view.data), view.strides[0]};
}

// The kernels must not leave the tensors, whoever calls.
void check_owners(const ByOwnerParams& p) {
    if (p.offsets.data == nullptr)
        throw py::type_error("offsets: expected a torch.Tensor, got None");
    int64_t before = 0;
    for (int64_t owner = 0; owner < p.owners; ++owner) {
        const int64_t end = *p.offsets.at(owner), rank = p.rank_of(owner);
        if (end < before || end > p.m)
            throw py::value_error("offsets: expected ends of owners from 0 to " +
                                  std::to_string(p.m) + " that do not decrease");
        if (rank < 0 || rank > p.r)
            throw py::value_error("ranks: expected values from 0 to " + std::to_string(p.r));
        before = end;
    }
}

template <class Params>
Params operands(py::handle x, py::handle a, py::handle b, py::handle offsets, py::handle ranks,
                py::handle alpha_t, py::handle scalings, py::handle seed, int activation,
                int dropout, float scaling, int threads) {
    auto p = common<Params>(x, seed, dropout, threads);
    if (activation < 0 || activation >= kActivationCount)
        throw std::invalid_argument("activation: unknown id");
    const TensorView view = view_of(b, "lora_b");
    p.owners = view.sizes[0], p.n = view.sizes[1], p.r = view.sizes[2];
    p.b = stack(view, "lora_b", p.owners, p.n, p.r);
    if (p.owners < 1 || p.n < 1 || p.r < 1 || p.r > kMaxRank)
        throw std::invalid_argument("sizes: expected G, N >= 1 and 1 <= r <= 256");
    p.a = stack(view_of(a, "lora_a"), "lora_a", p.owners, p.r, p.k);
    p.offsets = per_owner<int32_t>(offsets, "offsets", p.owners, Element::i32);
    p.ranks = per_owner<int32_t>(ranks, "ranks", p.owners, Element::i32);
    p.scalings = per_owner<float>(scalings, "scaling", p.owners, Element::f32);
    if (activation != static_cast<int>(Activation::identity)) {
        p.alpha_t = per_owner<float>(alpha_t, "alpha_t", p.owners, Element::f32);
        if (p.alpha_t.data == nullptr)
            throw py::type_error("alpha_t: expected a torch.Tensor, got None");
    }
    p.activation = activation;
    p.scaling = scaling;
    check_owners(p);
    return p;
}

// ranks, alpha_t, scalings, base and z may be None. out may be base.
void forward_by_owner(py::handle x, py::handle a, py::handle b, py::handle offsets,
                      py::handle ranks, py::handle alpha_t, py::handle scalings, py::handle seed,
                      int activation, int dropout, float scaling, int threads, py::handle base,
                      py::handle out, py::handle z) {
    auto p = operands<ByOwnerForwardParams>(x, a, b, offsets, ranks, alpha_t, scalings, seed,
                                            activation, dropout, scaling, threads);
    p.base = matrix(base, "base", p.m, p.n, p.dtype);
    p.out = matrix(out, "out", p.m, p.n, p.dtype);
    p.z = dense(z, "z", p.m, p.r, p.dtype);
    if (p.out.data == nullptr)
        throw py::type_error("out: expected a torch.Tensor, got None");
    const py::gil_scoped_release unlocked;
    forward(p);
}

// z, dx, da and db are contiguous; dx, da and db may be None: not wanted.
void backward_by_owner(py::handle x, py::handle a, py::handle b, py::handle offsets,
                       py::handle ranks, py::handle alpha_t, py::handle scalings, py::handle seed,
                       int activation, int dropout, float scaling, int threads, py::handle dy,
                       py::handle z, py::handle dx, py::handle da, py::handle db,
                       bool accumulate_dx) {
    auto p = operands<ByOwnerBackwardParams>(x, a, b, offsets, ranks, alpha_t, scalings, seed,
                                             activation, dropout, scaling, threads);
    p.dy = matrix(dy, "dy", p.m, p.n, p.dtype);
    p.z = dense(z, "z", p.m, p.r, p.dtype);
    p.da = gradient(da, "da", p.owners, p.r, p.k, p.a.first.dtype);
    p.db = gradient(db, "db", p.owners, p.n, p.r, p.b.first.dtype);
    if (p.dy.data == nullptr)
        throw py::type_error("dy: expected a torch.Tensor, got None");
    if (p.z.data == nullptr)
        throw py::type_error("z: expected a torch.Tensor, got None");
    set_dx(p, dx, accumulate_dx);
    const py::gil_scoped_release unlocked;
    backward(p);
}

}  // namespace

}  // namespace afa::cpu

void bind_by_owner(py::module_& module) {
    module.def("cpu_forward_by_owner", &afa::cpu::forward_by_owner);
    module.def("cpu_backward_by_owner", &afa::cpu::backward_by_owner);
}
