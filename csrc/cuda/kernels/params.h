// What the kernels are given: pointers, sizes and strides in elements. T is the dtype of x, R the
// rank class of the kernel.
//
// Layers that share x are members of one call. Their ranks lie side by side in the R columns of z
// (and of h, dz and the rows of A): those of a member begin at a multiple of kRankUnit. A lone
// layer is a call of one member.
#pragma once

#include <cstdint>

namespace afa {

constexpr int kMaxMembers = 3;
constexpr int kRankUnit = 16;  // what one mma sums over
constexpr int kMaxRank = 64;
constexpr int kMaxSegments = 8;       // of a sum over K or N
constexpr int kSumsAtOnce = 16;       // partial results that a thread has under way
constexpr int kSlab = 512;            // columns of dy of which a block makes a partial sum of dh
constexpr int kNoMember = INT32_MAX;  // `first` of a place that no member takes

// Dropout of x. threshold 0: none, and seed is not read.
struct DropoutParams {
    const int64_t* seed;
    int threshold;      // of 256
    int64_t first_row;  // of x, where the kernel is given a part of its rows
};

// A weight as the kernels read it: T, in rows of whole vectors of 16 bytes that start at multiples
// of 16 bytes. What lies beyond its rows and columns counts as zeros.
struct Weight {
    const void* data;
    int64_t row_stride;
    int rows, cols;
};

// A product (M, W) x (W, R). W is summed in segments, and the sums of the segments are added in
// order: by one block (splits 1), or by whoever reads the partial products of one block per
// segment.
struct ProjectParams {
    const void* wide;  // T [M, W], row stride wide_stride: x or dy
    int64_t wide_stride;
    Weight narrow;   // x pass: A (up to R, W), of all members. dy pass: B (W, up to R)
    float* partial;  // [splits, M, R]
    int64_t m;
    int w;
    int segment;  // columns, a multiple of the tiles' kDepth
    int splits;   // blocks: 1, or one per segment
    int stages;
    DropoutParams dropout;
};

// y = base + scaling * phi(z) B^T of one member.
struct ForwardMember {
    int first;         // of its column tiles among those of all members
    int rank0, ranks;  // its columns of z and h; those of the last member end at R
    Weight b;          // (N, r or more)
    const void* base;  // T [M, N], row stride base_stride, may be y itself; null: 0
    int64_t base_stride;
    void* y;  // T [M, N], row stride y_stride
    int64_t y_stride;
    void* z;               // T [M, z_cols]; null: not stored
    int z_cols;            // r
    const float* alpha_t;  // [1]; null at identity
    int activation;
    float scaling;
};

// z from x (forward kernel) or from partial sums of z (expand kernel), and y.
struct ForwardParams {
    ProjectParams
        project;  // x, A; `partial` is read by the expand kernel and unused in the forward kernel
    ForwardMember members[kMaxMembers];
    int count;
    int column_tiles;   // of all members
    int column_blocks;  // blocks that share them (expand kernel)
    float inverse_keep;
};

enum class Output : int { fp32, t };

struct DyMember {
    int first;       // of its slabs among those of all members
    const void* dy;  // T [M, N], row stride dy_stride
    int64_t dy_stride;
    Weight b;              // (N, r or more)
    const void* z;         // T [M, z_cols]
    int z_cols;            // r
    const float* alpha_t;  // [1]; null at identity
    float* dh;             // [slabs, M, R]; null: not needed
    float* db;             // [chunks, N, R]; null: not needed
    int activation;
    float scaling;
};

// One pass over every dy: dh = dy B by slab of columns, dB = dy^T h by chunk of rows. Here R is the
// rank class of the largest member.
struct DyParams {
    DyMember members[kMaxMembers];
    bool adds;  // to db
    int64_t m, rows_per_chunk;
    int stages;
};

// Per row of (M, cols): dz = scale * phi'(z) * sum, or h = phi(z), or both.
struct SumRowsJob {
    int first;             // of its blocks (reduce kernel)
    const float* partial;  // [count, M, partial_stride]; null: no sum, h only
    int count;
    int partial_stride;  // the sum is 0 in columns beyond it
    const void* z;       // T [M, r]
    void* dz;            // T [M, cols], row stride R; null: not needed
    void* h;             // T [M, cols], row stride R; null: not needed
    const float* alpha_t;
    int64_t m;
    int r, cols, rank_class;
    int activation;
    float scale;
};

// One pass over a wide matrix by slab of columns and chunk of rows, with a sum of outer products
// over the rows of a chunk: dA = dz^T x, or dB = dy^T h.
struct OuterPass {
    const void* wide;  // T [M, W], row stride wide_stride: x or dy
    int64_t wide_stride;
    const void* narrow;  // T [M, R]: dz or h
    float* partial;      // [chunks, R, W] (x) or [chunks, W, R] (dy); null: not needed
    bool adds;           // to partial
    int64_t m, rows_per_chunk;
    int w;
    int stages;
};

// dx = dz A and dA = dz^T x in one pass over x.
struct OuterParams : OuterPass {
    Weight a;  // (up to R, W), of all members
    void* dx;  // T [M, W], row stride W; null: not needed
    DropoutParams dropout;
};

// out = scale * the sum of `count` partial results, in order.
struct SumWeightJob {
    int first;             // of its blocks
    const float* partial;  // [count, rows_stride / partial_cols rows, partial_cols]
    void* out;             // float or T [rows, cols]
    Output type;
    int count;
    int64_t rows, rows_stride;  // rows_stride: elements of one partial result
    int cols, partial_cols;
    float scale;
};

// A or B of a member as the caller has it, (rows, cols) of float or T, and where it is to lie as T,
// filled up with zeros.
struct PackJob {
    int first;  // of its blocks
    const void* data;
    int64_t row_stride, col_stride;
    int rows, cols;
    bool is_float;
    bool in_vectors;  // rows of whole vectors of 16 bytes that start at multiples of 16 bytes
    void* out;        // T [out_rows, out_cols]
    int out_rows, out_cols;
};

struct PackParams {
    PackJob a[kMaxMembers], b[kMaxMembers];
    int a_blocks;  // the other blocks do every B
};

struct ReduceParams {
    SumRowsJob rows[kMaxMembers];
    SumWeightJob weights[kMaxMembers];
    int rows_blocks;  // the other blocks do the weights
};

// Of the kernel of prim_check.cuh.
constexpr int kPrimitiveCheckWords = 608;
struct PrimitiveCheckParams {
    const uint16_t* in;   // T [32, 16]: two 16 x 16 matrices
    const float* values;  // [128]
    uint32_t* out;        // [kPrimitiveCheckWords]
};

}  // namespace afa
