// A and B as the other kernels read them: rounded to T, side by side, padded with zeros.
#pragma once

#include "cuda/kernels/tile.cuh"

namespace afa {

template <typename T>
AFA_DEVICE float element_of(const PackJob& job, int row, int col) {
    if (col >= job.cols)
        return 0.0f;
    const int64_t index = row * job.row_stride + col * job.col_stride;
    if (job.is_float)
        return load_global(static_cast<const float*>(job.data) + index);
    return unpack<T>(load_global(static_cast<const uint16_t*>(job.data) + index)).x;
}

// Eight elements of a row, from column `col` on.
template <typename T>
AFA_DEVICE Vec16 packed(const PackJob& job, int row, int col) {
    Vec16 v{};
    if (row >= job.rows)
        return v;
    if (!job.in_vectors) {
        AFA_UNROLL
        for (int i = 0; i < 4; ++i)
            v.word[i] = pack<T>(element_of<T>(job, row, col + 2 * i),
                                element_of<T>(job, row, col + 2 * i + 1));
        return v;
    }
    if (col >= job.cols)
        return v;
    const int64_t index = row * job.row_stride + col;
    if (!job.is_float)
        return load_global(reinterpret_cast<const Vec16*>(static_cast<const T*>(job.data) + index));
    const auto* floats =
        reinterpret_cast<const Float4*>(static_cast<const float*>(job.data) + index);
    const Float4 low = load_global(floats), high = load_global(floats + 1);
    return {{pack<T>(low.x, low.y), pack<T>(low.z, low.w), pack<T>(high.x, high.y),
             pack<T>(high.z, high.w)}};
}

// Grid: the blocks of every A, then those of every B; eight elements to a thread.
template <typename T>
AFA_KERNEL(kSmallThreads)
pack_kernel(const PackParams p) {
    follow_previous_kernel();
    const bool is_a = block_x() < p.a_blocks;
    const int block = is_a ? block_x() : block_x() - p.a_blocks;
    const PackJob job = is_a ? member_with(p.a, block) : member_with(p.b, block);
    const int vectors = job.out_cols / kVector;
    const int64_t index = static_cast<int64_t>(block - job.first) * kSmallThreads + thread_index();
    const int row = static_cast<int>(index / vectors);
    const int col = static_cast<int>(index % vectors) * kVector;
    if (row < job.out_rows)
        store_global(reinterpret_cast<Vec16*>(static_cast<T*>(job.out) +
                                              static_cast<int64_t>(row) * job.out_cols + col),
                     packed<T>(job, row, col));
}

}  // namespace afa
