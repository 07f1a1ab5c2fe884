// dB = dy^T h at R = 64, in a pass over dy of its own: where one pass makes dh as well
// (dy_kernel), the partial sums of slabs for which there is room take as many bytes as a second
// pass.
#pragma once

#include "cuda/outer.cuh"

namespace afa {

// dB = dy^T h with h read from memory: one slab of kColumns columns of dy and one chunk of rows.
template <typename T, int R>
AFA_DEVICE void db_pass(const OuterPass& p, SharedMemory& shared, int slab, int chunk) {
    using Tile = OuterTile<R>;
    constexpr int kWidePitch = pitch(Tile::kColumns), kNarrowPitch = pitch(R);
    const int ahead = p.stages - 1;
    T* wide_ring = shared.take<T>(p.stages * Tile::kWide);
    T* narrow_ring = shared.take<T>(p.stages * Tile::kNarrow);
    const int col0 = slab * Tile::kColumns;
    const int64_t row_begin = chunk * p.rows_per_chunk;
    const int64_t row_end = row_begin + p.rows_per_chunk < p.m ? row_begin + p.rows_per_chunk : p.m;
    const int tiles = static_cast<int>((row_end - row_begin + Tile::kRows - 1) / Tile::kRows);

    const auto load = [&](int t, int slot) {
        if (t < tiles) {
            const int64_t row0 = row_begin + t * Tile::kRows;
            load_tile<Tile::kRows, Tile::kColumns, Tile::kThreads>(
                wide_ring + slot * Tile::kWide, static_cast<const T*>(p.wide), p.wide_stride, row0,
                row_end, col0, p.w);
            load_tile<Tile::kRows, R, Tile::kThreads>(narrow_ring + slot * Tile::kNarrow,
                                                      static_cast<const T*>(p.narrow), R, row0,
                                                      row_end, 0, R);
        }
        copy_commit();
    };
    for (int s = 0; s < ahead; ++s)
        load(s, s);
    float db[Tile::kSlice / 16][R / 8][4];
    zero(db);
    int slot = 0;
    AFA_ROLLED
    for (int t = 0; t < tiles; ++t) {
        wait_oldest(p.stages);
        block_sync();
        load(t + ahead, slot == 0 ? ahead : slot - 1);
        add_outer<T, Tile::kRows, Tile::kSlice, R, kWidePitch, kNarrowPitch>(
            db, wide_ring + slot * Tile::kWide + warp_index() * Tile::kSlice,
            narrow_ring + slot * Tile::kNarrow);
        slot = slot == ahead ? 0 : slot + 1;
    }
    copy_wait<0>();
    store_outer<Tile::kSlice, R>(p.partial + static_cast<int64_t>(chunk) * p.w * R, db,
                                 col0 + warp_index() * Tile::kSlice, p.w, 0, R, p.adds);
}

// Grid: (slabs, chunks).
template <typename T, int R>
AFA_KERNEL(OuterTile<R>::kThreads, OuterTile<R>::kDbBlocks)
db_kernel(const OuterPass p) {
    follow_previous_kernel();
    SharedMemory shared;
    db_pass<T, R>(p, shared, block_x(), block_y());
}

}  // namespace afa
