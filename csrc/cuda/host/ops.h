// The operator on the device: which kernels run, in which order, on which scratch memory. Plain C++
// on top of launch.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/host/plan.h"
#include "cuda/kernels/launch.h"

namespace afa {

// A (r, K) or B (N, r) as the caller holds it: dtype of x or float32, any strides.
struct WeightOperand {
    const void* data;
    int64_t row_stride, col_stride;
    bool is_float;
};

// What one layer brings to forward and backward.
struct MemberOperands {
    WeightOperand a, b;
    const float* alpha_t;  // null at identity
    int activation;
    float scaling;
};

// A, or those of all members side by side, and every B, as the kernels read them.
struct KernelWeights {
    Weight a, b[kMaxMembers];
};

// What forward and backward have in common. `shape` says how many members there are.
struct BranchCall {
    DType dtype;  // of x and all T below
    Shape shape;
    const void* x;  // T [M, K], row stride x_stride, a multiple of 8
    int64_t x_stride;
    MemberOperands members[kMaxMembers];
    const int64_t* seed;    // null without dropout
    int threshold;          // of 256 elements of x that are dropped
    int64_t first_row = 0;  // of x, in a round of a backward
    KernelWeights weights;  // filled in by forward and backward themselves
    void* workspace;  // 256-byte aligned, of forward_workspace() or backward_workspace() bytes
    void* stream;
    DeviceLimits device;
};

struct MemberOutput {
    const void* base;  // T [M, N], row stride base_stride (0: a bias), may be y; null: 0
    int64_t base_stride;
    void* y;  // T [M, N], row stride y_stride
    int64_t y_stride;
    void* z;  // T [M, r], or null
};

struct ForwardCall : BranchCall {
    MemberOutput outputs[kMaxMembers];
};

struct MemberGradients {
    const void* dy;  // T [M, N], row stride dy_stride
    int64_t dy_stride;
    const void* z;  // T [M, r], that of the forward
    void* da;       // float or T [r, K]; null: not needed
    void* db;       // float or T [N, r]; null: not needed
    bool da_is_float, db_is_float;
};

struct BackwardCall : BranchCall {
    void* dx;  // T [M, K]; null: not needed
    MemberGradients gradients[kMaxMembers];
};

// Bytes of scratch memory.
int64_t forward_workspace(const Shape& shape);
int64_t backward_workspace(const Shape& shape);

// Raise std::invalid_argument for what the kernels cannot take, std::runtime_error where a launch
// fails.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

// The kernels that a call with saved z launches, in order, small ones aside.
std::vector<KernelPlan> kernels_of(const Shape& shape, const DeviceLimits& device);

}  // namespace afa
