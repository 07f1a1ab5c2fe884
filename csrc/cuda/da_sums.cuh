// dA by the x kernel itself, without the reduce kernel: where a slab of columns has one chunk of
// rows, its block has the result; where it has a few, whoever comes last adds up what all of them
// have stored.
#pragma once

#include "cuda/outer.cuh"

namespace afa {

// Chunks whose partial results are under way at once, as registers allow.
template <int R>
constexpr int kChunksAtOnce = R == 128 ? 1 : 2;

// Zeroes `count` counters, a multiple of 4, with the threads of one block.
template <int kThreads>
AFA_DEVICE void clear(uint32_t* counters, int count) {
    AFA_ROLLED
    for (int i = thread_index() * 4; i < count; i += kThreads * 4)
        store_global(reinterpret_cast<Vec16*>(counters + i), Vec16{});
}

// Whether this thread is the last one of its place in the blocks of the slab. A thread adds up what
// threads of its own place have stored, and nothing else: it has nobody of its block to wait for.
AFA_DEVICE bool is_last(const SlabSums& sums, int threads) {
    uint32_t* arrived = sums.arrived + block_x() * threads + thread_index();
    return take_ticket(arrived) == static_cast<uint32_t>(sums.blocks - 1);
}

// Stores what a warp has summed of dA, from column `col` on: as a partial result, as the result, or
// as the one and then the other. Partial results are added in the order of the chunks, as the
// reduce kernel does, so the bits do not depend on who was last.
template <typename T, int R, int kSlice>
AFA_DEVICE void store_da(const OuterParams& p, float (&da)[R / 16][kSlice / 8][4], int col,
                         int threads) {
    const SlabSums& sums = p.sums;
    const int64_t size = static_cast<int64_t>(R) * p.w;
    int stored = p.adds ? 1 : 0;  // partial results to be added
    if (sums.count != 1) {
        store_outer<R, kSlice>(p.partial + block_y() * size, da, 0, R, col, p.w, p.adds);
        if (sums.count == 0 || !is_last(sums, threads))
            return;
        zero(da);
        stored = sums.count;
    }
    AFA_ROLLED
    for (int chunk = 0; chunk < stored; chunk += kChunksAtOnce<R>)
        AFA_UNROLL
    for (int next = chunk; next < chunk + kChunksAtOnce<R>; ++next)
        AFA_UNROLL
    for (int i = 0; i < R / kRankUnit; ++i)
        add_stored<kSlice>(da[i], p.partial + next * size, i * kRankUnit,
                           next < stored ? i * kRankUnit + sums.da[i].rows : 0, col, p.w);
    AFA_UNROLL
    for (int i = 0; i < R / kRankUnit; ++i) {
        const int rows = sums.da[i].rows;
        store_rows<T, kSlice>(sums.da[i].out, sums.da[i].type, da[i], 0, rows, col, p.w, rows, p.w,
                              1.0f);
    }
}

}  // namespace afa
