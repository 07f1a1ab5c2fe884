// The small kernel: sums of partial results, in the order of their index.
#pragma once

#include "cuda/kernels/tile.cuh"

namespace afa {

AFA_DEVICE void add(float& sum, float part) { sum += part; }
AFA_DEVICE void add(Float2& sum, Float2 part) {
    sum.x += part.x;
    sum.y += part.y;
}

// The sum of `count` elements, `stride` floats apart. kSumsAtOnce of them are under way at once.
template <typename Element>
AFA_DEVICE Element sum_of(const float* partial, int count, int64_t stride) {
    Element sum{};
    AFA_ROLLED
    for (int first = 0; first < count; first += kSumsAtOnce) {
        Element part[kSumsAtOnce];
        AFA_UNROLL
        for (int i = 0; i < kSumsAtOnce; ++i, partial += stride)
            part[i] = first + i < count ? load_global(reinterpret_cast<const Element*>(partial))
                                        : Element{};
        AFA_UNROLL
        for (int i = 0; i < kSumsAtOnce; ++i)
            add(sum, part[i]);
    }
    return sum;
}

// dz = scale * phi'(z) * dh and h = phi(z), where they are asked for, of columns col and col + 1 of
// a row that exists.
template <typename T>
AFA_DEVICE void store_dz_and_h(const SumRowsJob& job, int64_t row, int col, float alpha_t,
                               Float2 dh) {
    const Float2 z = unpack<T>(load_pair(static_cast<const T*>(job.z), row, job.r, col));
    const ValueSlope low = anneal_by_id(job.activation, z.x, alpha_t);
    const ValueSlope high = anneal_by_id(job.activation, z.y, alpha_t);
    const int64_t index = row * job.rank_class + col;
    if (job.dz)
        store_global(
            reinterpret_cast<uint32_t*>(static_cast<T*>(job.dz) + index),
            within_rank(pack<T>(job.scale * low.slope * dh.x, job.scale * high.slope * dh.y), col,
                        job.r));
    if (job.h)
        store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(job.h) + index),
                     pack<T>(low.value, high.value));
}

template <typename T>
AFA_DEVICE void sum_rows(const SumRowsJob& job, int64_t pair) {
    const int half = job.cols / 2;
    const int64_t row = pair / half;
    const int col = static_cast<int>(pair % half) * 2;
    if (row >= job.m)
        return;
    Float2 sum{0.0f, 0.0f};
    if (job.partial && col < job.partial_stride)
        sum = sum_of<Float2>(job.partial + row * job.partial_stride + col, job.count,
                             job.m * job.partial_stride);
    store_dz_and_h<T>(job, row, col, alpha_of(job.alpha_t), sum);
}

template <typename T>
AFA_DEVICE void sum_weight(const SumWeightJob& job, int64_t element) {
    const int64_t row = element / job.cols;
    const int col = static_cast<int>(element % job.cols);
    if (row >= job.rows)
        return;
    const float* partial = job.partial + row * job.partial_cols + col;
    const float sum = job.scale * sum_of<float>(partial, job.count, job.rows_stride);
    if (job.type == Output::fp32)
        store_global(static_cast<float*>(job.out) + element, sum);
    else
        store_global(static_cast<uint16_t*>(job.out) + element,
                     static_cast<uint16_t>(pack<T>(sum, 0.0f)));
}

// Grid: the blocks of the jobs on rows, then those of the weights.
template <typename T>
AFA_KERNEL(kSmallThreads)
reduce_kernel(const ReduceParams p) {
    follow_previous_kernel();
    const auto thread = [](int block) {
        return static_cast<int64_t>(block) * kSmallThreads + thread_index();
    };
    if (block_x() < p.rows_blocks) {
        const SumRowsJob job = member_with(p.rows, block_x());
        sum_rows<T>(job, thread(block_x() - job.first));
    } else {
        const int block = block_x() - p.rows_blocks;
        const SumWeightJob job = member_with(p.weights, block);
        sum_weight<T>(job, thread(block - job.first));
    }
}

}  // namespace afa
