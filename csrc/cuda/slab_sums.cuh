// dA and dB by the kernels that pass over x and dy, without the reduce kernel: where a slab of
// columns has one chunk of rows, its block has the result; where it has a few, whoever comes last
// adds up what all of them have stored.
#pragma once

#include "cuda/outer.cuh"

namespace afa {

// Chunks whose partial results of dA are under way at once, as registers allow.
template <int R>
constexpr int kChunksAtOnce = R == 16 ? 4 : 2;

// Zeroes `count` counters, a multiple of 4, with the threads of one block.
template <int kThreads>
AFA_DEVICE void clear(uint32_t* counters, int count) {
    AFA_ROLLED
    for (int i = thread_index() * 4; i < count; i += kThreads * 4)
        store_global(reinterpret_cast<Vec16*>(counters + i), Vec16{});
}

// Whether this thread is the last one of its place in the blocks of the slab. A thread adds up what
// threads of its own place have stored, and nothing else: it has nobody of its block to wait for.
AFA_DEVICE bool is_last(const SlabSums& sums, int slab, int threads) {
    uint32_t* arrived = sums.arrived + slab * threads + thread_index();
    return take_ticket(arrived) == static_cast<uint32_t>(sums.blocks - 1);
}

// Stores what a warp has summed of dA, from column `col` on: as a partial result, as the result, or
// as the one and then the other. Partial results are added in the order of the chunks, as the
// reduce kernel does, so the bits do not depend on who was last.
template <typename T, int R, int kSlice>
AFA_DEVICE void store_da(const OuterParams& p, float (&da)[R / 16][kSlice / 8][4], int slab,
                         int chunk, int col, int threads) {
    const int64_t size = static_cast<int64_t>(R) * p.w;
    int stored = p.adds ? 1 : 0;  // partial results to be added
    if (p.sums.count != 1) {
        store_outer<R, kSlice>(p.partial + chunk * size, da, 0, R, col, p.w, p.adds);
        if (p.sums.count == 0 || !is_last(p.sums, slab, threads))
            return;
        zero(da);
        stored = p.sums.count;
    }
    AFA_ROLLED
    for (int first = 0; first < stored; first += kChunksAtOnce<R>)
        AFA_UNROLL
    for (int next = first; next < first + kChunksAtOnce<R>; ++next)
        AFA_UNROLL
    for (int i = 0; i < R / kRankUnit; ++i)
        add_stored<kSlice>(da[i], p.partial + next * size, i * kRankUnit,
                           next < stored ? i * kRankUnit + p.da[i].rows : 0, col, p.w);
    AFA_UNROLL
    for (int i = 0; i < R / kRankUnit; ++i) {
        const int rows = p.da[i].rows;
        store_rows<T, kSlice>(p.da[i].out, p.da[i].type, da[i], 0, rows, col, p.w, rows, p.w, 1.0f);
    }
}

// The same of dB (n, r), whose rows from `row` on the warp has summed; `partial` is [chunks, n, R].
template <typename T, int R, int kSlice>
AFA_DEVICE void store_db(const WeightGradient& result, float scaling, int r, const SlabSums& sums,
                         float* partial, bool adds, float (&db)[kSlice / 16][R / 8][4], int slab,
                         int chunk, int row, int n, int threads) {
    const int64_t size = static_cast<int64_t>(n) * R;
    int stored = adds ? 1 : 0;
    if (sums.count != 1) {
        store_outer<kSlice, R>(partial + chunk * size, db, row, n, 0, R, adds);
        if (sums.count == 0 || !is_last(sums, slab, threads))
            return;
        zero(db);
        stored = sums.count;
    }
    AFA_ROLLED
    for (int next = 0; next < stored; ++next)
        AFA_UNROLL
    for (int i = 0; i < kSlice / 16; ++i)
        add_stored<R>(db[i], partial + next * size, row + i * 16, n, 0, R);
    store_result<T, kSlice, R>(result.out, result.type, db, row, n, 0, r, n, r, scaling);
}

}  // namespace afa
