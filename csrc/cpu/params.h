// What a call of the CPU kernels consists of: raw pointers, int64 sizes and strides in elements.
//
//   z = dropout(x) A^T,  h = phi(z),  y = base + scaling * h B^T
//   dz = scaling * (dY B) * phi'(z),  dX = dropout(dz A)
//   dA = dz^T dropout(x),  dB = scaling * dY^T h
//
// A call has one member or several: layers on the same x, each with its own A and B. dX is the sum
// over the members.
#pragma once

#include <cstdint>

namespace afa::cpu {

constexpr int64_t kMaxRank = 256;  // of a member, and of all members together

// A second thread costs more than it brings below this many multiply-adds.
constexpr int64_t kWorthThreads = 200000;

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

struct Matrix {
    void* data = nullptr;  // null: absent
    int64_t row_stride = 0;
    int64_t col_stride = 0;
    Dtype dtype = Dtype::f32;
};

struct CommonParams {
    int64_t m = 0, k = 0;
    Matrix x;                       // (M, K)
    Dtype dtype = Dtype::f32;       // of x, y, z, dy and dx; never f64
    const int64_t* seed = nullptr;  // 1 value, read if dropout > 0
    int dropout = 0;                // dropped values out of 256; 0 with several members
    int64_t first_row = 0;          // of the dropout mask, which the first row of x has
    int threads = 1;
};

struct Member {
    int64_t n = 0, r = 0;
    Matrix a;                        // (r, K), any dtype
    Matrix b;                        // (N, r), any dtype
    const float* alpha_t = nullptr;  // 1 value; null at identity
    int activation = 0;
    float scaling = 1.0f;
};

struct ForwardMember : Member {
    Matrix base;  // (M, N), or absent: zero; may be `out` itself
    Matrix out;   // (M, N), written
    Matrix z;     // (M, r), written if present
};

struct ForwardParams : CommonParams {
    const ForwardMember* members = nullptr;
    int64_t count = 0;  // of members
};

struct BackwardMember : Member {
    Matrix dy;  // (M, N)
    Matrix z;   // (M, r), that of the forward
    Matrix da;  // (r, K), dense, any dtype, written if present
    Matrix db;  // (N, r), columns adjacent, any dtype, written if present
};

struct BackwardParams : CommonParams {
    const BackwardMember* members = nullptr;
    int64_t count = 0;           // of members
    Matrix dx;                   // (M, K), dense, written if present
    bool accumulate_dx = false;  // add to what dx holds; not with dropout
};

// The kernels of one instruction set. They allocate their scratch and throw std::bad_alloc if they
// cannot.
struct Kernels {
    void (*forward)(const ForwardParams&);
    void (*backward)(const BackwardParams&);
};

}  // namespace afa::cpu
