// The small kernels: sums of partial results, in the order of their index, and operands padded to the rank class.
#pragma once

#include "cuda/tile.cuh"

namespace afa {

constexpr int kReduceThreads = 128;

// Elements index and index + 1 of a row-major float matrix, summed over `count` matrices of `size` elements.
AFA_DEVICE Float2 sum_pair(const float* partial, int count, int64_t size, int64_t index) {
    Float2 sum{0.0f, 0.0f};
    for (int i = 0; i < count; ++i) {
        const Float2 part = load_global(reinterpret_cast<const Float2*>(partial + i * size + index));
        sum.x += part.x;
        sum.y += part.y;
    }
    return sum;
}

template <typename T>
AFA_DEVICE void sum_rows(const SumRowsJob& job, int64_t pair) {
    const int half = job.rank_class / 2;
    const int64_t row = pair / half;
    const int col = static_cast<int>(pair % half) * 2;
    if (row >= job.m)
        return;
    const int64_t index = row * job.rank_class + col;
    Float2 sum{0.0f, 0.0f};
    if (job.partial)
        sum = sum_pair(job.partial, job.count, job.m * job.rank_class, index);
    if (job.z_out) {
        store_pair(static_cast<T*>(job.z_out), row, job.r, col, pack<T>(job.scale * sum.x, job.scale * sum.y));
        return;
    }
    const float alpha_t = load_global(job.alpha_t);
    const Float2 z = unpack<T>(load_pair(static_cast<const T*>(job.z), row, job.r, col));
    const ValueSlope low = anneal_by_id(job.activation, z.x, alpha_t);
    const ValueSlope high = anneal_by_id(job.activation, z.y, alpha_t);
    if (job.dz)
        store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(job.dz) + index),
                     pack<T>(job.scale * low.slope * sum.x, job.scale * high.slope * sum.y));
    if (job.h)
        store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(job.h) + index), pack<T>(low.value, high.value));
}

template <typename T>
AFA_DEVICE void sum_weight(const SumWeightJob& job, int64_t element) {
    const int64_t row = element / job.cols;
    const int col = static_cast<int>(element % job.cols);
    if (row >= job.rows)
        return;
    const float* partial = job.partial + row * job.partial_cols + col;
    float sum = 0.0f;
    for (int i = 0; i < job.count; ++i)
        sum += load_global(partial + i * job.rows_stride);
    sum *= job.scale;
    if (job.type == Output::fp32)
        store_global(static_cast<float*>(job.out) + element, sum);
    else
        store_global(static_cast<uint16_t*>(job.out) + element, static_cast<uint16_t>(pack<T>(sum, 0.0f)));
}

// Grid: the blocks of the rows job, then those of the two weight jobs.
template <typename T>
AFA_KERNEL(kReduceThreads)
reduce_kernel(const ReduceParams p) {
    int block = block_x();
    if (block < p.blocks[0])
        return sum_rows<T>(p.rows, static_cast<int64_t>(block) * kReduceThreads + thread_index());
    block -= p.blocks[0];
    const bool second = block >= p.blocks[1];
    if (second)
        block -= p.blocks[1];
    sum_weight<T>(p.weight[second], static_cast<int64_t>(block) * kReduceThreads + thread_index());
}

template <typename T>
AFA_DEVICE float operand(const PackParams& p, int job, int64_t row, int col) {
    if (row >= p.rows[job] || col >= p.cols[job])
        return 0.0f;
    const int64_t index = row * p.row_stride[job] + col * p.col_stride[job];
    if (p.source_is_float[job])
        return load_global(static_cast<const float*>(p.source[job]) + index);
    return unpack<T>(load_global(static_cast<const uint16_t*>(p.source[job]) + index)).x;
}

// Grid: the blocks of A, then those of B. One thread makes two neighbouring elements.
template <typename T>
AFA_KERNEL(kReduceThreads)
pack_kernel(const PackParams p) {
    const int job = block_x() >= p.blocks;
    const int64_t block = job ? block_x() - p.blocks : block_x();
    const int64_t pair = block * kReduceThreads + thread_index();
    const int half = p.padded_cols[job] / 2;
    const int64_t row = pair / half;
    const int col = static_cast<int>(pair % half) * 2;
    if (row >= p.padded_rows[job])
        return;
    store_global(static_cast<uint32_t*>(p.target[job]) + pair,
                 pack<T>(operand<T>(p, job, row, col), operand<T>(p, job, row, col + 1)));
}

}  // namespace afa
