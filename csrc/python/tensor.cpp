#include "python/tensor.h"

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace afa {

namespace {

constexpr int kElements = static_cast<int>(Element::other);

// What use_torch has learnt. The references are kept for good: types live as long as the process.
struct Torch {
    PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
    PyObject* dtypes[kElements] = {};
    const dlpack::ExchangeTable* table = nullptr;
    // Names of attributes, made once.
    PyObject *shape = nullptr, *stride = nullptr, *dtype = nullptr, *data_ptr = nullptr,
             *is_cpu = nullptr, *is_neg = nullptr;
};
Torch known;

const dlpack::ExchangeTable* exchange_table(const py::object& tensor_type) {
    const py::object capsule = py::getattr(tensor_type, dlpack::kAttribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule))
        return nullptr;
    const auto* table = static_cast<const dlpack::ExchangeTable*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    const bool usable =
        table->major_version == dlpack::kMajorVersion && table->tensor_from_object != nullptr;
    return usable ? table : nullptr;
}

Element element_of(const dlpack::DataType& dtype) {
    if (dtype.lanes != 1)
        return Element::other;
    switch (dtype.code << 8 | dtype.bits) {
    case dlpack::kFloat << 8 | 32:
        return Element::f32;
    case dlpack::kBfloat << 8 | 16:
        return Element::bf16;
    case dlpack::kFloat << 8 | 16:
        return Element::f16;
    case dlpack::kFloat << 8 | 64:
        return Element::f64;
    case dlpack::kInt << 8 | 64:
        return Element::i64;
    case dlpack::kInt << 8 | 32:
        return Element::i32;
    default:
        return Element::other;
    }
}

void check_type(py::handle tensor, const char* name) {
    if (known.tensor_type == nullptr)
        throw std::logic_error("use_torch has not been called");
    if (!PyObject_TypeCheck(tensor.ptr(), known.tensor_type))
        throw py::type_error(std::string(name) + ": expected a torch.Tensor, got " +
                             Py_TYPE(tensor.ptr())->tp_name);
}

void check_dimensions(int64_t dimensions, const char* name) {
    if (dimensions > TensorView::kMaxDimensions)
        throw py::value_error(std::string(name) + ": expected at most three dimensions, got " +
                              std::to_string(dimensions));
}

py::object attribute(py::handle tensor, PyObject* name) {
    PyObject* value = PyObject_GetAttr(tensor.ptr(), name);
    if (value == nullptr)
        throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

py::object call(py::handle tensor, PyObject* method) {
    PyObject* value = PyObject_CallMethodNoArgs(tensor.ptr(), method);
    if (value == nullptr)
        throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

// DLPack lends the memory of a lazily negated tensor without a word of the sign.
bool holds_its_values(py::handle tensor, const dlpack::Tensor& lent) {
    const bool empty =
        std::any_of(lent.sizes, lent.sizes + lent.dimensions, [](int64_t n) { return n == 0; });
    if (lent.data == nullptr && !empty)
        return false;
    PyObject* negated = PyObject_CallMethodNoArgs(tensor.ptr(), known.is_neg);
    Py_XDECREF(negated);
    if (negated == nullptr)
        PyErr_Clear();
    return negated == Py_False;
}

int64_t integer(PyObject* value) {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred())
        throw py::error_already_set();
    return number;
}

TensorView on_cpu(const TensorView& view, const char* name) {
    if (!view.on_cpu)
        throw py::value_error(std::string(name) + ": expected a tensor on the CPU");
    return view;
}

TensorView attributes_of(py::handle tensor, const char* name) {
    check_type(tensor, name);
    const py::object sizes = attribute(tensor, known.shape), strides = call(tensor, known.stride);
    const py::object dtype = attribute(tensor, known.dtype);
    const py::ssize_t dimensions = PyTuple_GET_SIZE(sizes.ptr());
    check_dimensions(dimensions, name);
    TensorView view;
    view.on_cpu = attribute(tensor, known.is_cpu).ptr() == Py_True;
    view.data = reinterpret_cast<void*>(integer(call(tensor, known.data_ptr).ptr()));
    view.dimensions = static_cast<int>(dimensions);
    for (int i = 0; i < kElements; ++i)
        if (dtype.ptr() == known.dtypes[i])
            view.element = static_cast<Element>(i);
    for (int i = 0; i < view.dimensions; ++i) {
        view.sizes[i] = integer(PyTuple_GET_ITEM(sizes.ptr(), i));
        view.strides[i] = integer(PyTuple_GET_ITEM(strides.ptr(), i));
    }
    return view;
}

}  // namespace

void use_torch(const py::module_& torch) {
    const py::object tensor_type = torch.attr("Tensor");
    known.table = exchange_table(tensor_type);
    const char* const names[kElements] = {"float32", "bfloat16", "float16",
                                          "float64", "int64",    "int32"};
    for (int i = 0; i < kElements; ++i)
        known.dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
    known.parameter_type = reinterpret_cast<PyTypeObject*>(
        py::object(torch.attr("nn").attr("Parameter")).release().ptr());
    known.shape = PyUnicode_InternFromString("shape");
    known.stride = PyUnicode_InternFromString("stride");
    known.dtype = PyUnicode_InternFromString("dtype");
    known.data_ptr = PyUnicode_InternFromString("data_ptr");
    known.is_cpu = PyUnicode_InternFromString("is_cpu");
    known.is_neg = PyUnicode_InternFromString("is_neg");
    known.tensor_type = reinterpret_cast<PyTypeObject*>(py::object(tensor_type).release().ptr());
}

bool has_exchange_table() { return known.table != nullptr; }

TensorView view_of(py::handle tensor, const char* name) {
    return on_cpu(view_anywhere(tensor, name), name);
}

TensorView view_anywhere(py::handle tensor, const char* name) {
    if (known.table == nullptr)
        return attributes_of(tensor, name);
    check_type(tensor, name);
    dlpack::Tensor lent;
    if (known.table->tensor_from_object(tensor.ptr(), &lent) != 0)
        throw py::error_already_set();
    check_dimensions(lent.dimensions, name);
    TensorView view;
    view.on_cpu = lent.device_type == dlpack::kDeviceCpu;
    view.data = static_cast<char*>(lent.data) + lent.byte_offset;
    view.dimensions = lent.dimensions;
    view.element = element_of(lent.dtype);
    for (int i = 0; i < lent.dimensions; ++i) {
        view.sizes[i] = lent.sizes[i];
        view.strides[i] = lent.strides[i];
    }
    return view;
}

bool lend_plain(py::handle tensor, dlpack::Tensor* out) {
    const PyTypeObject* type = Py_TYPE(tensor.ptr());
    if (known.table == nullptr || (type != known.tensor_type && type != known.parameter_type))
        return false;
    if (known.table->tensor_from_object(tensor.ptr(), out) != 0) {
        PyErr_Clear();  // a layout, wrapper or dtype that DLPack does not know
        return false;
    }
    const bool in_memory =
        out->device_type == dlpack::kDeviceCpu || out->device_type == dlpack::kDeviceCuda;
    return in_memory && element_of(out->dtype) <= Element::f64 && holds_its_values(tensor, *out);
}

TensorView view_by_attributes(py::handle tensor, const char* name) {
    return on_cpu(attributes_of(tensor, name), name);
}

}  // namespace afa
