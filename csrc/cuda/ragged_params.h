// What the ragged kernels are given: the parameters of a lone call on all rows, and what says how
// rows, A, B, rank, alpha_t and scaling belong to groups.
//
// "Ragged": the rows of x are sorted by group, each group with its own A and B. Group g has the
// rows from the end of the group before it to ends[g] - 1; rows behind the last end belong to no
// group.
#pragma once

#include "cuda/params.h"

namespace afa {

struct Groups {
    int64_t rows;          // of x
    int count, r;          // groups; the rank of those without one of their own
    const int32_t* ends;   // [count], on the device
    const int32_t* ranks;  // [count], from 0 to r; null: all r
    const float* scaling;  // [count]; null: that of the lone call
    int64_t ends_stride, ranks_stride, scaling_stride, alpha_stride;
    int64_t a_stride, b_stride;  // elements between the A, and the B, of two groups
    int64_t chunk_rows;          // that a sum over the rows of a group takes at a time
};

// z and y.
struct RaggedForwardParams {
    Groups groups;
    ForwardParams call;
};

// x A^T, or dy B; here `partial` is [splits, rows of x, R].
struct RaggedProjectParams {
    Groups groups;
    ProjectParams call;
    int low_rank_segment;  // of groups of ranks up to kSlabRank
};

// dz and h of the rows of x, with an alpha_t, a scale and a number of partial sums for each group.
struct RaggedRowsParams {
    Groups groups;
    SumRowsJob job;
    int low_rank_count;  // of partial sums, for groups of ranks up to kSlabRank
    float scaling, inverse_keep;
};

// A sum over the rows of each group: dA of the x pass, or dB of the pass over dy. Groups of up to
// chunk_rows rows have one chunk, whose block writes the result; the chunks of others leave partial
// results, of one round of columns, to the sum kernel.
struct GroupSums {
    void* out;       // float or T [count, r, W] (dA) or [count, W, r] (dB); null: not needed
    float* partial;  // [partial results, R, columns] or [partial results, columns, R]
    Output type;
    int first_slab, slabs;         // of the round
    int first_column, columns, w;  // of the round; of all
    float scaling;                 // of dB, where the groups have none of their own
};

// One pass over dy (R <= 32), as DyParams; dh is [slabs of the round, rows of x, R].
struct RaggedDyParams {
    Groups groups;
    DyParams call;
    GroupSums sums;
};

struct RaggedOuterParams {
    Groups groups;
    OuterParams call;
    GroupSums sums;
};

struct RaggedSumParams {
    Groups groups;
    GroupSums da, db;
    int rank_class;
    int da_blocks, db_blocks;  // for each group that has several chunks
};

constexpr int kRowsOfPiece = 16;  // that a block of the rows kernel takes

}  // namespace afa
