// The part of DLPack 1.x (https://dmlc.github.io/dlpack) that lends a tensor for the time of a
// call: a table of functions behind the attribute __dlpack_c_exchange_api__ of the tensor's type. A
// binary interface, fixed per major version; names are DLPack's, in this project's spelling.
#pragma once

#include <cstdint>

namespace afa::dlpack {

constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kDeviceCpu = 1, kDeviceCuda = 2;

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dimensions;
    DataType dtype;
    int64_t* sizes;
    int64_t* strides;
    uint64_t byte_offset;
};

struct ExchangeTable {
    uint32_t major_version, minor_version;
    ExchangeTable* older;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    // May be null. Sets a Python error unless it returns 0.
    int (*tensor_from_object)(void* object, Tensor* out);
    void* current_stream;
};

}  // namespace afa::dlpack
