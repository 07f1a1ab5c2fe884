// Backward kernels. With u = dy B (times scaling) and dz = u * phi'(z):
//
//   dy_kernel (R <= 32): dh = dy B and dB = dy^T h from one pass over dy.
//   project_dy_kernel (R = 64): dh. The db_kernel passes over dy once more, for dB = dy^T h.
//   reduce_kernel: dz, and at R = 64 h, from the sums of dh.
//   x_kernel: dx = dz A and dA = dz^T x from one pass over x.
//
// Layers that share x have one dz, side by side, so that dx is the sum over them.
//
// A block keeps one slab of columns and walks down one chunk of rows. What it sums over rows stays
// in registers and is stored once, as a partial result of its chunk, which the reduce kernel adds
// up in order, so that sums have one order whatever the grid. A call of many rows is a series of
// launches (rounds): each adds to the partial results of the one before it.
#pragma once

#include "cuda/kernels/forward.cuh"
#include "cuda/kernels/outer.cuh"

namespace afa {

// dh += dy B for the 16 rows of this warp, from one tile of dy and the rows of B for its columns.
template <typename T, int R>
AFA_DEVICE void add_dh(float (&dh)[R / 8][4], const T* tile, const T* b_rows) {
    using Tile = DyTile<R>;
    constexpr int kWidePitch = pitch(Tile::kDepth), kNarrowPitch = pitch(R);
    AFA_UNROLL
    for (int k = 0; k < Tile::kDepth; k += 16) {
        uint32_t a[4];
        load_matrices(a, tile + warp_index() * 16 * kWidePitch + k + down_first<kWidePitch>());
        AFA_UNROLL
        for (int j = 0; j < R / 16; ++j) {
            uint32_t b[4];
            load_matrices_transposed(b, b_rows + k * kNarrowPitch + j * 16 +
                                            down_first<kNarrowPitch>());
            multiply_add<T>(dh[2 * j], a, b[0], b[1]);
            multiply_add<T>(dh[2 * j + 1], a, b[2], b[3]);
        }
    }
}

template <int R>
AFA_DEVICE void store_dh(float* slab_dh, const float (&dh)[R / 8][4], int64_t row0,
                         int64_t row_end) {
    const int64_t row = row0 + warp_index() * 16 + lane_index() / 4;
    float* out = slab_dh + row * R + lane_index() % 4 * 2;
    AFA_UNROLL
    for (int half = 0; half < 2; ++half)
        if (row + 8 * half < row_end) {
            AFA_UNROLL
            for (int j = 0; j < R / 8; ++j)
                store_global(reinterpret_cast<Float2*>(out + 8 * half * R + j * 8),
                             Float2{dh[j][2 * half], dh[j][2 * half + 1]});
        }
}

// dh and dB of a member from one slab of kColumns columns of its dy and one chunk of rows. Grid:
// (slabs of every dy, chunks).
template <typename T, int R>
AFA_KERNEL(DyTile<R>::kThreads, DyTile<R>::kBlocks)
dy_kernel(const DyParams p) {
    follow_previous_kernel();
    const DyMember member = member_with(p.members, block_x());
    const int slab = block_x() - member.first, chunk = block_y();
    float* slab_dh = member.dh + slab * p.m * R;
    SharedMemory shared;
    using Tile = DyTile<R>;
    constexpr int kWidePitch = pitch(Tile::kDepth), kNarrowPitch = pitch(R);
    constexpr int kPairs = Tile::kRows * R / 2 / Tile::kThreads;  // of z, per thread and step
    const int n = member.b.rows;
    const T* dy = static_cast<const T*>(member.dy);
    const T* z = static_cast<const T*>(member.z);
    const int ahead = p.stages - 1;
    T* ring = shared.take<T>(p.stages * Tile::kWide);
    T* b_slab = shared.take<T>(Tile::kB);
    T* h_tiles = shared.take<T>(2 * Tile::kH);
    const int col0 = slab * Tile::kColumns;
    const int64_t row_begin = chunk * p.rows_per_chunk;
    const int64_t row_end = row_begin + p.rows_per_chunk < p.m ? row_begin + p.rows_per_chunk : p.m;
    const int steps = static_cast<int>((row_end - row_begin + Tile::kRows - 1) / Tile::kRows);
    const float alpha_t = alpha_of(member.alpha_t);

    const auto load = [&](int tile, int slot) {  // kTiles tiles in each step
        if (tile < steps * Tile::kTiles)
            load_tile<Tile::kRows, Tile::kDepth, Tile::kThreads>(
                ring + slot * Tile::kWide, dy, member.dy_stride,
                row_begin + tile / Tile::kTiles * Tile::kRows, row_end,
                col0 + tile % Tile::kTiles * Tile::kDepth, n);
        copy_commit();
    };
    uint32_t z_next[kPairs];
    const auto load_z = [&](int t) {
        AFA_UNROLL
        for (int i = 0; i < kPairs; ++i) {
            const int pair = thread_index() + i * Tile::kThreads;
            const int64_t row = row_begin + t * Tile::kRows + pair / (R / 2);
            z_next[i] = row < row_end ? load_pair(z, row, member.z_cols, pair % (R / 2) * 2) : 0u;
        }
    };

    if (member.dh)
        load_weight<Tile::kColumns, R, Tile::kThreads>(b_slab, member.b, col0, 0);
    for (int s = 0; s < ahead; ++s)
        load(s, s);  // B belongs to the first group
    load_z(0);
    float db[Tile::kTiles][Tile::kSlice / 16][R / 8][4];
    AFA_UNROLL
    for (int c = 0; c < Tile::kTiles; ++c)
        zero(db[c]);
    int slot = 0;
    AFA_ROLLED
    for (int t = 0; t < steps; ++t) {
        // Two tiles of h, by turns: slower warps may still read the other one.
        T* h = h_tiles + (t & 1) * Tile::kH;
        if (member.db) {
            AFA_UNROLL
            for (int i = 0; i < kPairs; ++i) {
                const int pair = thread_index() + i * Tile::kThreads;
                store_shared(h + pair / (R / 2) * kNarrowPitch + pair % (R / 2) * 2,
                             phi_pair<T>(member.activation, z_next[i], alpha_t));
            }
        }
        float dh[R / 8][4] = {};
        AFA_UNROLL
        for (int c = 0; c < Tile::kTiles; ++c) {
            wait_oldest(p.stages);
            block_sync();
            load(t * Tile::kTiles + c + ahead, slot == 0 ? ahead : slot - 1);
            if (c == 0)
                load_z(t + 1);
            const T* tile = ring + slot * Tile::kWide;
            if (member.dh)
                add_dh<T, R>(dh, tile, b_slab + c * Tile::kDepth * kNarrowPitch);
            if (member.db)
                add_outer<T, Tile::kRows, Tile::kSlice, R, kWidePitch, kNarrowPitch>(
                    db[c], tile + warp_index() * Tile::kSlice, h);
            slot = slot == ahead ? 0 : slot + 1;
        }
        if (member.dh)
            store_dh<R>(slab_dh, dh, row_begin + t * Tile::kRows, row_end);
    }
    copy_wait<0>();
    if (!member.db)
        return;
    AFA_UNROLL
    for (int c = 0; c < Tile::kTiles; ++c)
        store_outer<Tile::kSlice, R>(member.db + static_cast<int64_t>(chunk) * n * R, db[c],
                                     col0 + c * Tile::kDepth + warp_index() * Tile::kSlice, n, 0, R,
                                     p.adds);
}

// Grid: (tiles of rows, splits).
template <typename T, int R>
AFA_KERNEL(RowTile<R>::kThreads, RowTile<R>::kBlocks)
project_dy_kernel(const ProjectParams p) {
    follow_previous_kernel();
    SharedMemory shared;
    project_rows<T, R, true>(p, shared, static_cast<int64_t>(block_x()) * RowTile<R>::kRows,
                             block_y());
}

// dB = dy^T h at R = 64, from one slab of kColumns columns of dy and one chunk of rows, in a pass
// of its own: where one pass makes dh as well (dy_kernel), the partial sums of slabs for which
// there is room take as many bytes as a second pass. Grid: (slabs, chunks).
template <typename T, int R>
AFA_KERNEL(OuterTile<R>::kThreads, OuterTile<R>::kDbBlocks)
db_kernel(const OuterPass p) {
    follow_previous_kernel();
    const int slab = block_x(), chunk = block_y();
    SharedMemory shared;
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

// dx = dz A for the columns of this warp: into `slice` of a tile in shared memory, then 16-byte
// stores.
template <typename T, int R>
AFA_DEVICE void emit_dx(T* slice, const T* dz, const uint16_t* masks,
                        const uint32_t (&a)[R / 16][OuterTile<R>::kSlice / 16][4],
                        const OuterParams& p, int64_t row0, int64_t row_end, int col0) {
    using Tile = OuterTile<R>;
    constexpr int kWidePitch = pitch(Tile::kColumns), kSlice = Tile::kSlice, kRows = Tile::kRows;
    AFA_UNROLL
    for (int i = 0; i < kRows; i += 16) {
        float acc[kSlice / 8][4] = {};
        AFA_UNROLL
        for (int k = 0; k < R / 16; ++k) {
            uint32_t left[4];
            load_matrices(left, dz + i * pitch(R) + k * 16 + down_first<pitch(R)>());
            AFA_UNROLL
            for (int j = 0; j < kSlice / 16; ++j) {
                multiply_add<T>(acc[2 * j], left, a[k][j][0], a[k][j][1]);
                multiply_add<T>(acc[2 * j + 1], left, a[k][j][2], a[k][j][3]);
            }
        }
        T* out = slice + (i + lane_index() / 4) * kWidePitch + lane_index() % 4 * 2;
        AFA_UNROLL
        for (int j = 0; j < kSlice / 8; ++j) {
            store_shared(out + j * 8, pack<T>(acc[j][0], acc[j][1]));
            store_shared(out + 8 * kWidePitch + j * 8, pack<T>(acc[j][2], acc[j][3]));
        }
    }
    warp_sync();
    constexpr int kVectors = kSlice / kVector;
    AFA_UNROLL
    for (int i = 0; i < kRows * kVectors; i += kWarpSize) {
        const int row = (i + lane_index()) / kVectors,
                  col = (i + lane_index()) % kVectors * kVector;
        Vec16 v = load_shared<Vec16>(slice + row * kWidePitch + col);
        if (p.dropout.threshold > 0)
            v = keep(
                v, load_shared<uint16_t>(masks + row * Tile::kMaskPitch + col / kDropoutColumns) >>
                       (col % kDropoutColumns));
        if (row0 + row < row_end && col0 + col < p.w)
            store_global(
                reinterpret_cast<Vec16*>(static_cast<T*>(p.dx) + (row0 + row) * p.w + col0 + col),
                v);
    }
}

// dx and dA of one slab of kColumns columns of x and one chunk of rows. Each warp works on its own
// slice of the slab, and reuses the place of its x for dx. Grid: (slabs, chunks).
template <typename T, int R>
AFA_KERNEL(OuterTile<R>::kThreads, OuterTile<R>::kXBlocks)
x_kernel(const OuterParams p) {
    follow_previous_kernel();
    const int slab = block_x(), chunk = block_y();
    SharedMemory shared;
    using Tile = OuterTile<R>;
    constexpr int kWidePitch = pitch(Tile::kColumns), kNarrowPitch = pitch(R),
                  kSlice = Tile::kSlice, kRows = Tile::kRows;
    const int ahead = p.stages - 1;
    T* wide_ring = shared.take<T>(p.stages * Tile::kWide);
    T* narrow_ring = shared.take<T>(p.stages * Tile::kNarrow);
    T* a_slab = shared.take<T>(Tile::kA);
    uint16_t* masks = shared.take<uint16_t>(Tile::kRows * Tile::kMaskPitch);
    const int col0 = slab * Tile::kColumns, slice0 = warp_index() * kSlice;
    const int64_t row_begin = chunk * p.rows_per_chunk;
    const int64_t row_end = row_begin + p.rows_per_chunk < p.m ? row_begin + p.rows_per_chunk : p.m;
    const int tiles = static_cast<int>((row_end - row_begin + kRows - 1) / kRows);

    const auto load = [&](int t, int slot) {
        if (t < tiles) {
            const int64_t row0 = row_begin + t * kRows;
            if (p.partial)
                load_tile<kRows, Tile::kColumns, Tile::kThreads>(
                    wide_ring + slot * Tile::kWide, static_cast<const T*>(p.wide), p.wide_stride,
                    row0, row_end, col0, p.w);
            load_tile<kRows, R, Tile::kThreads>(narrow_ring + slot * Tile::kNarrow,
                                                static_cast<const T*>(p.narrow), R, row0, row_end,
                                                0, R);
        }
        copy_commit();
    };
    if (p.dx)
        load_weight<R, Tile::kColumns, Tile::kThreads>(a_slab, p.a, 0, col0);
    for (int s = 0; s < ahead; ++s)
        load(s, s);  // A belongs to the first group
    wait_oldest(p.stages);
    block_sync();
    uint32_t a[R / 16][kSlice / 16][4];
    if (p.dx) {
        AFA_UNROLL
        for (int k = 0; k < R / 16; ++k)
            AFA_UNROLL
        for (int j = 0; j < kSlice / 16; ++j)
            load_matrices_transposed(a[k][j], a_slab + k * 16 * kWidePitch + slice0 + j * 16 +
                                                  down_first<kWidePitch>());
    }
    float da[R / 16][kSlice / 8][4];
    zero(da);
    int slot = 0;
    AFA_ROLLED
    for (int t = 0; t < tiles; ++t) {
        wait_oldest(p.stages);
        block_sync();
        load(t + ahead, slot == 0 ? ahead : slot - 1);
        T* slice = wide_ring + slot * Tile::kWide + slice0;
        const T* dz = narrow_ring + slot * Tile::kNarrow;
        uint16_t* slice_masks = masks + slice0 / kDropoutColumns;
        const int64_t row0 = row_begin + t * kRows;
        if (p.dropout.threshold > 0) {
            drop<kRows, kSlice, kWidePitch>(slice, slice_masks, Tile::kMaskPitch, p.dropout, row0,
                                            col0 + slice0, p.w, p.partial != nullptr);
            warp_sync();
        }
        if (p.partial)
            add_outer<T, kRows, R, kSlice, kNarrowPitch, kWidePitch>(da, dz, slice);
        if (p.dx) {
            warp_sync();  // all lanes have read x from the slice
            emit_dx<T, R>(slice, dz, slice_masks, a, p, row0, row_end, col0 + slice0);
        }
        slot = slot == ahead ? 0 : slot + 1;
    }
    copy_wait<0>();
    if (p.partial)
        store_outer<R, kSlice>(p.partial + static_cast<int64_t>(chunk) * R * p.w, da, 0, R,
                               col0 + slice0, p.w, p.adds);
}

}  // namespace afa
