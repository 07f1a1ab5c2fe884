// The sums of the partial results of groups that have several chunks of rows, in the order of the
// chunks.
#pragma once

#include "cuda/ragged.cuh"

namespace afa {

// The group with several chunks whose first row is among rows [place * chunk_rows, (place + 1) *
// chunk_rows); there is at most one. -1: none.
template <int kThreads>
AFA_DEVICE int group_of_chunks(const Groups& groups, SharedMemory& shared, int64_t place) {
    int* found = shared.take<int>(1);
    if (thread_index() == 0)
        store_shared(found, -1);
    block_sync();
    AFA_ROLLED
    for (int g = thread_index(); g < groups.count; g += kThreads) {
        const int64_t first_row = end_of(groups, g - 1);
        if (end_of(groups, g) - first_row > groups.chunk_rows &&
            first_row / groups.chunk_rows == place)
            store_shared(found, g);
    }
    block_sync();
    return load_shared<int>(found);
}

// Element `element` of the round of the result of a group; `transposed`: of dB. A round has few
// enough for 32 bits: its partial results have room in scratch memory.
template <typename T, bool kTransposed>
AFA_DEVICE void sum_chunks(const RaggedSumParams& p, const GroupSums& sums, const Place& at,
                           uint32_t element) {
    const uint32_t r = p.groups.r, inner = kTransposed ? r : sums.columns;
    const int64_t row = element / inner;
    const int col = static_cast<int>(element % inner);
    const int rank = kTransposed ? col : static_cast<int>(row);
    const int64_t column = sums.first_column + (kTransposed ? row : col);
    if (row >= (kTransposed ? sums.columns : r) || column >= sums.w)
        return;
    const int pitch = kTransposed ? p.rank_class : sums.columns;
    const int64_t size = static_cast<int64_t>(p.rank_class) * sums.columns;
    const float* partial = sums.partial + row * pitch + col;
    const int64_t chunks = chunks_of(p.groups, at);
    float sum = 0.0f;
    for (int64_t i = 0; i < chunks; ++i)
        sum += load_global(partial + partial_index(p.groups, at.first_row, i, chunks) * size);
    if (kTransposed)
        sum *= scaling_at(sums.scaling, p.groups, at);
    const int64_t index = kTransposed ? column * r + rank : row * sums.w + column;
    store_element<T>(result_of<T>(sums, p.groups, at.group), sums.type, index,
                     rank < at.rank ? sum : 0.0f);
}

// Grid: (rows / chunk_rows) x (blocks for the elements of dA and of dB), blocks fastest.
template <typename T>
AFA_KERNEL(kReduceThreads)
ragged_sum_kernel(const RaggedSumParams p) {
    follow_previous_kernel();
    SharedMemory shared;
    const int blocks = p.da_blocks + p.db_blocks, block = block_x() % blocks;
    Place at{};
    at.group = group_of_chunks<kReduceThreads>(p.groups, shared, block_x() / blocks);
    if (at.group < 0)
        return;
    at.rank = rank_of(p.groups, at.group);
    if (at.rank == 0)
        return;
    at.first_row = end_of(p.groups, at.group - 1);
    at.rows = end_of(p.groups, at.group) - at.first_row;
    const bool of_da = block < p.da_blocks;
    const uint32_t element =
        (of_da ? block : block - p.da_blocks) * kReduceThreads + thread_index();
    if (of_da)
        sum_chunks<T, false>(p, p.da, at, element);
    else
        sum_chunks<T, true>(p, p.db, at, element);
}

}  // namespace afa
