// The weights of a call as the kernels are told of them.
#pragma once

#include "cuda/check_call.h"
#include "cuda/ops.h"
#include "cuda/tiles.h"

namespace afa {

inline Weight weight(const WeightOperand& w, int rows, int cols) {
    const int vector = w.is_float ? kVector / 2 : kVector;  // elements in 16 bytes
    const bool in_vectors =
        w.col_stride == 1 && w.row_stride % vector == 0 && cols % vector == 0 && aligned(w.data);
    return {w.data, w.row_stride, w.col_stride, rows, cols, w.is_float, in_vectors};
}
inline Weight weight_a(const BranchCall& call, int i) {
    return weight(call.members[i].a, call.shape.members[i].r, call.shape.k);
}
inline Weight weight_b(const BranchCall& call, int i) {
    return weight(call.members[i].b, call.shape.members[i].n, call.shape.members[i].r);
}

inline bool is_rounded(const Weight& w) { return w.is_float || !w.in_vectors; }

inline bool any_a_rounded(const BranchCall& call) {
    bool any = false;
    for (int i = 0; i < call.shape.count; ++i)
        any = any || is_rounded(weight_a(call, i));
    return any;
}
inline Weights weights_of(const BranchCall& call) {
    bool any = any_a_rounded(call);
    for (int i = 0; i < call.shape.count; ++i)
        any = any || is_rounded(weight_b(call, i));
    return any ? Weights::rounded : Weights::as_they_are;
}

// The rows of every A, side by side as the ranks of the members are, kRankUnit in each block; what
// no member takes has no rows.
inline void fill_rank_rows(Weight (&blocks)[kMaxRank / kRankUnit], const BranchCall& call) {
    int block = 0;
    for (int i = 0; i < call.shape.count; ++i) {
        Weight a = weight_a(call, i);
        const int64_t bytes = kRankUnit * a.row_stride * (a.is_float ? kFloatBytes : kElementBytes);
        for (int left = a.rows; left > 0; left -= kRankUnit, ++block) {
            a.rows = left < kRankUnit ? left : kRankUnit;
            blocks[block] = a;
            a.data = static_cast<const char*>(a.data) + bytes;
        }
    }
    for (; block < kMaxRank / kRankUnit; ++block) {
        blocks[block] = blocks[0];
        blocks[block].rows = 0;
    }
}

}  // namespace afa
