// Rows by owner: the rows of x are sorted by owner, and each owner has its own A, B, rank, alpha_t
// and scaling. What the rows of an owner get are the bits of a call with that owner alone.
#pragma once

#include "cpu/params.h"

namespace afa::cpu {

// One value for each owner.
template <class T>
struct PerOwner {
    const T* data = nullptr;  // null: absent
    int64_t stride = 0;       // in elements; 0: one value for all

    const T* at(int64_t owner) const { return data + owner * stride; }
};

// One matrix for each owner, all of the same size.
struct Stack {
    Matrix first;
    int64_t stride = 0;  // in elements, from the matrix of one owner to that of the next

    bool present() const { return first.data != nullptr; }
    Matrix at(int64_t owner) const;
};

struct ByOwnerParams : CommonParams {
    int64_t owners = 0, n = 0, r = 0;
    PerOwner<int32_t> offsets;  // where the rows of each owner end; they do not decrease
    PerOwner<int32_t> ranks;    // from 0, no branch, to r; absent: all r
    PerOwner<float> alpha_t;    // absent at identity
    PerOwner<float> scalings;   // absent: `scaling` for all
    float scaling = 1.0f;
    int activation = 0;
    Stack a;  // (G, r, K), any dtype
    Stack b;  // (G, N, r), any dtype

    int64_t rank_of(int64_t owner) const { return ranks.data ? *ranks.at(owner) : r; }
};

// Rows of no owner and owners of rank 0 have no branch: their y is base, their z and dx are zero.
struct ByOwnerForwardParams : ByOwnerParams {
    Matrix base;  // (M, N), or absent: zero; may be `out` itself
    Matrix out;   // (M, N), written
    Matrix z;     // (M, r), dense, written if present, zero beyond the rank of an owner
};

struct ByOwnerBackwardParams : ByOwnerParams {
    Matrix dy;                   // (M, N)
    Matrix z;                    // (M, r), dense, that of the forward
    Matrix dx;                   // (M, K), dense, written if present
    bool accumulate_dx = false;  // add to what dx holds; not with dropout
    Stack da;  // (G, r, K), dense, written if present, zero where there is no branch
    Stack db;  // (G, N, r), likewise
};

// Run on params.threads threads at most, whose number never changes a bit of the results.
void forward(const ByOwnerForwardParams& params);
void backward(const ByOwnerBackwardParams& params);

}  // namespace afa::cpu
