// What the kernels are given: pointers, sizes and strides in elements. T is the dtype of x, R the
// padded rank.
#pragma once

#include <cstdint>

namespace afa {

// Dropout of x. threshold 0: none, and seed is not read.
struct DropoutParams {
    const int64_t* seed;
    int threshold;      // of 256
    int64_t first_row;  // of x, where the kernel is given a part of its rows
};

// A weight as the caller has it: (rows, cols) elements of float or T, any strides.
struct Weight {
    const void* data;
    int64_t row_stride, col_stride;
    bool is_float;
    bool in_tiles;  // T, in full tiles of 16-byte vectors: nothing to round or to pad
    int64_t rows;
    int cols;
};

// A product (M, W) x (W, R). W is summed in segments, and the sums of the segments are added in
// order: by one block (splits 1), or by whoever reads the partial products of one block per
// segment.
struct ProjectParams {
    const void* wide;  // T [M, W], row stride wide_stride: x or dy
    int64_t wide_stride;
    const void* narrow;  // T [R, W] (x pass) or [W, R] (dy pass), row stride narrow_stride: A or B
    int64_t narrow_stride;
    bool narrow_transposed;  // [W, R]; the kernel knows it from its template argument
    float* partial;          // [splits, M, R]
    int64_t m;
    int w;
    int segment;  // columns, a multiple of the tiles' kDepth
    int splits;   // blocks: 1, or one per segment
    int stages;
    DropoutParams dropout;
};

// y = base + scaling * phi(z) B^T and z, from x (forward kernel) or from partial sums of z (expand
// kernel).
struct ForwardParams {
    ProjectParams
        project;    // x, A; `partial` is read by the expand kernel and unused in the forward kernel
    const void* b;  // T [N, R], row stride b_stride
    int64_t b_stride;
    const void* base;  // T [M, N], row stride base_stride, may be y itself; null: 0
    int64_t base_stride;
    void* y;  // T [M, N], row stride y_stride
    int64_t y_stride;
    void* z;               // T [M, r]; null: not stored
    const float* alpha_t;  // [1]; null at identity
    int n, r;
    int column_blocks;  // blocks that share the columns of y (expand kernel)
    int activation;
    float scaling, inverse_keep;
};

// One pass over dy: dh = dy B by slab of columns, dB = dy^T h by chunk of rows.
struct DyParams {
    const void* dy;  // T [M, N], row stride dy_stride
    int64_t dy_stride;
    Weight b;              // (N, r)
    const void* z;         // T [M, r]
    const float* alpha_t;  // [1]; null at identity
    float* dh;             // [slabs, M, R]; null: not needed
    float* db;             // [chunks, N, R]; null: not needed
    bool adds;             // to db
    int64_t m, rows_per_chunk;
    int n, r;
    int stages;
    int activation;
};

// One pass over x: dx = dz A and dA = dz^T x by chunk of rows. Or, over dy at R >= 64: dB = dy^T h.
struct OuterParams {
    const void* wide;  // T [M, W], row stride wide_stride: x or dy
    int64_t wide_stride;
    const void* narrow;  // T [M, R]: dz or h
    Weight a;            // (r, W) (x pass only)
    void* dx;            // T [M, W], row stride W; null: not needed (x pass only)
    float* partial;      // [chunks, R, W] (x pass) or [chunks, W, R] (dy pass); null: not needed
    bool adds;           // to partial
    int64_t m, rows_per_chunk;
    int w;
    int stages;
    DropoutParams dropout;
};

enum class Output : int { fp32, t };

// out = scale * the sum of `count` partial results, in order.
struct SumWeightJob {
    const float* partial;  // [count, rows_stride / partial_cols rows, partial_cols]
    void* out;             // float or T [rows, cols]
    Output type;
    int count;
    int64_t rows, rows_stride;  // rows_stride: elements of one partial result
    int cols, partial_cols;
    float scale;
};

// Per row of (M, R), any subset of: z = scale * sum; dz = scale * phi'(z) * sum; h = phi(z).
struct SumRowsJob {
    const float* partial;  // [count, M, R]; null: no sum, h only
    int count;
    void* z_out;    // T [M, r]: then z comes from the sum
    const void* z;  // T [M, r]: else it is read
    void* dz;       // T [M, R]; null: not needed
    void* h;        // T [M, R]; null: not needed
    const float* alpha_t;
    int64_t m;  // 0: no job
    int r, rank_class;
    int activation;
    float scale;
};

struct ReduceParams {
    SumRowsJob rows;
    SumWeightJob db, da;
    int rows_blocks, db_blocks;  // the other blocks do dA
};

// target = source in the dtype of x, padded with zeros.
struct PackJob {
    Weight source;  // without data: no job
    void* target;   // T [padded_rows, padded_cols]
    int64_t padded_rows;
    int padded_cols;
};

struct PackParams {
    PackJob a, b;
    int a_blocks;  // the other blocks do B
};

}  // namespace afa
