// Forward kernels: z = x A^T, h = phi(z), y = base + scaling * h B^T, for every layer that shares
// x.
//
// forward_kernel does it in one pass, with one block per tile of rows. For few rows project_kernel
// gives each segment of the sum over K a block of its own and expand_kernel adds them up and
// finishes.
#pragma once

#include "cuda/kernels/tile.cuh"

namespace afa {

// total += acc, and acc = 0.
template <int kCount>
AFA_DEVICE void move_sum(float (&total)[kCount][4], float (&acc)[kCount][4]) {
    AFA_UNROLL
    for (int j = 0; j < kCount; ++j) {
        AFA_UNROLL
        for (int i = 0; i < 4; ++i) {
            total[j][i] += acc[j][i];
            acc[j][i] = 0.0f;
        }
    }
}

// total[j] = the 16 rows of this warp times 8-column tile j of the narrow matrix, over all columns
// (splits 1) or over the segment `split`.
//
// Each segment is summed for itself, so that a row has the same bits whether one block goes through
// all of them or one block through each.
//
// kTransposed: the narrow matrix is [W, R] (B, for dh = dy B), else [R, W] (A, for z = x A^T). On
// return no copy is under way, but other warps may still read the rings.
template <typename T, int R, bool kTransposed>
AFA_DEVICE void project(float (&total)[R / 8][4], const ProjectParams& p, T* wide_ring,
                        T* narrow_ring, int64_t row0, int split) {
    using Tile = RowTile<R>;
    constexpr int kNarrow = kTransposed ? Tile::kNarrowTransposed : Tile::kNarrow;
    constexpr int kWidePitch = pitch(Tile::kDepth),
                  kNarrowPitch = pitch(kTransposed ? R : Tile::kDepth);
    const T* wide = static_cast<const T*>(p.wide);
    const int tiles = (p.w + Tile::kDepth - 1) / Tile::kDepth,
              segment_tiles = p.segment / Tile::kDepth;
    const int first = split * segment_tiles;
    const int last = p.splits == 1 || first + segment_tiles > tiles ? tiles : first + segment_tiles;
    const int ahead = p.stages - 1;
    const int warp_row = warp_index() * 16;

    const auto load = [&](int t, int slot) {
        if (t < last) {
            const int col0 = t * Tile::kDepth;
            load_tile<Tile::kRows, Tile::kDepth, Tile::kThreads>(
                wide_ring + slot * Tile::kWide, wide, p.wide_stride, row0, p.m, col0, p.w);
            if constexpr (kTransposed)
                load_weight<Tile::kDepth, R, Tile::kThreads>(narrow_ring + slot * kNarrow, p.narrow,
                                                             col0, 0);
            else
                load_weight<R, Tile::kDepth, Tile::kThreads>(narrow_ring + slot * kNarrow, p.narrow,
                                                             0, col0);
        }
        copy_commit();
    };

    float acc[R / 8][4] = {};
    AFA_UNROLL
    for (int j = 0; j < R / 8; ++j)
        total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0.0f;
    for (int s = 0; s < ahead; ++s)
        load(first + s, s);
    int slot = 0, left = segment_tiles;
    AFA_ROLLED
    for (int t = first; t < last; ++t) {
        wait_oldest(p.stages);
        block_sync();  // the tile is complete, and the slot that is filled next has been read by
                       // all
        load(t + ahead, slot == 0 ? ahead : slot - 1);
        T* rows = wide_ring + slot * Tile::kWide + warp_row * kWidePitch;
        const T* other = narrow_ring + slot * kNarrow;
        if (!kTransposed && p.dropout.threshold > 0) {
            drop<16, Tile::kDepth, kWidePitch>(rows, nullptr, 0, p.dropout, row0 + warp_row,
                                               t * Tile::kDepth, p.w, true);
            warp_sync();
        }
        AFA_UNROLL
        for (int k = 0; k < Tile::kDepth; k += 16) {
            uint32_t a[4];
            load_matrices(a, rows + k + down_first<kWidePitch>());
            AFA_UNROLL
            for (int j = 0; j < R / 16; ++j) {
                uint32_t b[4];
                if constexpr (kTransposed)
                    load_matrices_transposed(b, other + k * kNarrowPitch + j * 16 +
                                                    down_first<kNarrowPitch>());
                else
                    load_matrices(b,
                                  other + j * 16 * kNarrowPitch + k + right_first<kNarrowPitch>());
                multiply_add<T>(acc[2 * j], a, b[0], b[1]);
                multiply_add<T>(acc[2 * j + 1], a, b[2], b[3]);
            }
        }
        if (--left == 0) {
            move_sum(total, acc);
            left = segment_tiles;
        }
        slot = slot == ahead ? 0 : slot + 1;
    }
    move_sum(total, acc);  // of a segment that W cuts short; else zeros
    copy_wait<0>();
}

// Turns the 16 rows of this warp in `tile` into h = phi(z) and stores z where asked for.
// `pair_of(row, col)` gives elements col and col + 1 of z, rounded to T.
template <typename T, int R, typename PairOf>
AFA_DEVICE void finish_rows(T* tile, const ForwardParams& p, int64_t row0, bool store_z,
                            const PairOf& pair_of) {
    AFA_ROLLED
    for (int i = 0; i < p.count; ++i) {
        const ForwardMember member = member_at(p.members, i);
        const float alpha_t = alpha_of(member.alpha_t);
        const int pairs = member.ranks / 2;
        AFA_ROLLED
        for (int j = lane_index(); j < 16 * pairs; j += kWarpSize) {
            const int row = warp_index() * 16 + j / pairs, col = j % pairs * 2;
            const uint32_t pair = within_rank(pair_of(row, member.rank0 + col), col, member.z_cols);
            if (store_z && member.z && row0 + row < p.project.m)
                store_pair(static_cast<T*>(member.z), row0 + row, member.z_cols, col, pair);
            // h comes from the rounded z: the backward has only that one.
            store_shared(tile + row * pitch(R) + member.rank0 + col,
                         phi_pair<T>(member.activation, pair, alpha_t));
        }
    }
    warp_sync();
}

// y[rows of this block, 32 columns from col) = base + scaling * the products in `acc`.
template <typename T>
AFA_DEVICE void store_columns(const ForwardMember& member, const float (&acc)[4][4], int64_t row0,
                              int64_t rows, int col0) {
    const T* base = static_cast<const T*>(member.base);
    const int col = col0 + lane_index() % 4 * kVector;
    AFA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + lane_index() / 4 + half * 8;
        if (row < rows && col < member.b.rows) {
            Vec16 old{};
            if (base)
                old = load_global(
                    reinterpret_cast<const Vec16*>(base + row * member.base_stride + col));
            Vec16 sum;
            AFA_UNROLL
            for (int j = 0; j < 4; ++j) {
                const Float2 added = unpack<T>(old.word[j]);
                sum.word[j] = pack<T>(added.x + member.scaling * acc[j][2 * half],
                                      added.y + member.scaling * acc[j][2 * half + 1]);
            }
            T* y = static_cast<T*>(member.y) + row * member.y_stride + col;
            store_global(reinterpret_cast<Vec16*>(y), sum);
        }
    }
}

// The same of all columns of a tile of B, from the fragments of h of this warp.
template <typename T, int R>
AFA_DEVICE void emit_tile(const ForwardMember& member, const uint32_t (&h)[R / 16][4],
                          const T* b_tile, int64_t row0, int64_t rows, int col0) {
    const int depth = member.z_cols;
    AFA_UNROLL
    for (int c = 0; c < RowTile<R>::kColumns; c += 32) {
        float acc[4][4] = {};
        AFA_UNROLL
        for (int k = 0; k < R; k += 16) {
            if (k > 0 && k >= depth)
                continue;
            AFA_UNROLL
            for (int half = 0; half < 2; ++half) {
                uint32_t b[4];
                load_matrices(b, b_tile + (c + half * 16) * pitch(R) + k + right_first<pitch(R)>());
                multiply_add<T>(acc[2 * half], h[k / 16], b[0], b[1]);
                multiply_add<T>(acc[2 * half + 1], h[k / 16], b[2], b[3]);
            }
        }
        store_columns<T>(member, acc, row0, rows, col0 + c);
    }
}

// y = base + scaling * h B^T for the rows of this block and the column tiles first .. last, counted
// through all members, one member after the other. `make_h` leaves h in `tile`, while the first
// tiles of B are under way.
template <typename T, int R, typename MakeH>
AFA_DEVICE void emit_columns(const T* tile, T* b_ring, int stages, const ForwardParams& p,
                             int64_t row0, int first, int last, const MakeH& make_h) {
    using Tile = RowTile<R>;
    const int warp_row = warp_index() * 16, ahead = stages - 1;
    bool made = false;
    AFA_ROLLED
    for (int i = 0; i < p.count; ++i) {
        const ForwardMember member = member_at(p.members, i);
        const int tiles = (member.b.rows + Tile::kColumns - 1) / Tile::kColumns;
        const int begin = first > member.first ? first - member.first : 0;
        const int end = last - member.first < tiles ? last - member.first : tiles;
        if (begin >= end)
            continue;
        const auto load = [&](int t, int slot) {
            if (t < end)
                load_weight<Tile::kColumns, R, Tile::kThreads, true>(
                    b_ring + slot * Tile::kB, member.b, static_cast<int64_t>(t) * Tile::kColumns,
                    0);
            copy_commit();
        };
        if (made)
            block_sync();  // the ring has been read by all
        for (int s = 0; s < ahead; ++s)
            load(begin + s, s);
        if (!made)
            make_h();
        made = true;
        const int depth = member.z_cols;
        uint32_t h[R / 16][4] = {};
        AFA_UNROLL
        for (int k = 0; k < R; k += 16)
            if (k < depth)
                load_matrices(h[k / 16], tile + warp_row * pitch(R) + member.rank0 + k +
                                             down_first<pitch(R)>());
        int slot = 0;
        AFA_ROLLED
        for (int t = begin; t < end; ++t) {
            wait_oldest(stages);
            block_sync();
            load(t + ahead, slot == 0 ? ahead : slot - 1);
            emit_tile<T, R>(member, h, b_ring + slot * Tile::kB, row0 + warp_row, p.project.m,
                            t * Tile::kColumns);
            slot = slot == ahead ? 0 : slot + 1;
        }
    }
    copy_wait<0>();
}

// Grid: one block per kRows rows. x, A and B pass through shared memory once.
template <typename T, int R>
AFA_KERNEL(RowTile<R>::kThreads, RowTile<R>::kBlocks)
forward_kernel(const ForwardParams p) {
    follow_previous_kernel();
    using Tile = RowTile<R>;
    SharedMemory shared;
    const int64_t row0 = static_cast<int64_t>(block_x()) * Tile::kRows;
    const int stages = p.project.stages;
    T* wide_ring = shared.take<T>(stages * Tile::kWide);
    T* narrow_ring = shared.take<T>(stages * Tile::kNarrow);

    float acc[R / 8][4];
    project<T, R, false>(acc, p.project, wide_ring, narrow_ring, row0, 0);
    block_sync();  // the rings have been read by all: they become the tile of z and the ring of B
    T *tile = narrow_ring, *b_ring = wide_ring;
    const int row = warp_index() * 16 + lane_index() / 4, col = lane_index() % 4 * 2;
    AFA_UNROLL
    for (int j = 0; j < R / 8; ++j) {
        T* z = tile + row * pitch(R) + j * 8 + col;
        store_shared(z, pack<T>(p.inverse_keep * acc[j][0], p.inverse_keep * acc[j][1]));
        store_shared(z + 8 * pitch(R),
                     pack<T>(p.inverse_keep * acc[j][2], p.inverse_keep * acc[j][3]));
    }
    warp_sync();
    emit_columns<T, R>(tile, b_ring, stages, p, row0, 0, p.column_tiles, [&] {
        finish_rows<T, R>(tile, p, row0, true, [&](int r, int c) {
            return load_shared<uint32_t>(tile + r * pitch(R) + c);
        });
    });
}

// Stores the 16 rows of this warp of a product, or of one segment of it.
template <int R>
AFA_DEVICE void store_partial(const float (&acc)[R / 8][4], const ProjectParams& p, int64_t row0,
                              int split) {
    const int64_t row = row0 + warp_index() * 16 + lane_index() / 4;
    float* out = p.partial + (split * p.m + row) * R + lane_index() % 4 * 2;
    AFA_UNROLL
    for (int half = 0; half < 2; ++half)
        if (row + 8 * half < p.m) {
            AFA_UNROLL
            for (int j = 0; j < R / 8; ++j)
                store_global(reinterpret_cast<Float2*>(out + 8 * half * R + j * 8),
                             Float2{acc[j][2 * half], acc[j][2 * half + 1]});
        }
}

// The work of one block: the product of its kRows rows, or that of one segment, into `partial`.
template <typename T, int R, bool kTransposed>
AFA_DEVICE void project_rows(const ProjectParams& p, SharedMemory& shared, int64_t row0,
                             int split) {
    using Tile = RowTile<R>;
    T* wide_ring = shared.take<T>(p.stages * Tile::kWide);
    T* narrow_ring =
        shared.take<T>(p.stages * (kTransposed ? Tile::kNarrowTransposed : Tile::kNarrow));

    float acc[R / 8][4];
    project<T, R, kTransposed>(acc, p, wide_ring, narrow_ring, row0, split);
    store_partial<R>(acc, p, row0, split);
}

// Grid: (tiles of rows, splits).
template <typename T, int R>
AFA_KERNEL(RowTile<R>::kThreads, RowTile<R>::kBlocks)
project_kernel(const ProjectParams p) {
    follow_previous_kernel();
    SharedMemory shared;
    project_rows<T, R, false>(p, shared, static_cast<int64_t>(block_x()) * RowTile<R>::kRows,
                              block_y());
}

// z and y of kRows rows and one of column_blocks parts of the columns, from the splits, summed in
// order. The first column block stores z. Grid: (tiles of rows, column blocks).
template <typename T, int R>
AFA_KERNEL(RowTile<R>::kThreads, RowTile<R>::kBlocks)
expand_kernel(const ForwardParams p) {
    follow_previous_kernel();
    using Tile = RowTile<R>;
    SharedMemory shared;
    const int stages = p.project.stages, column_block = block_y();
    const int64_t row0 = static_cast<int64_t>(block_x()) * Tile::kRows;
    T* tile = shared.take<T>(Tile::kZ);
    T* b_ring = shared.take<T>(stages * Tile::kB);

    const int64_t tiles = p.column_tiles;
    const int first = static_cast<int>(tiles * column_block / p.column_blocks),
              last = static_cast<int>(tiles * (column_block + 1) / p.column_blocks);
    const auto sum_of_splits = [&](int row, int col) {
        const float* partial = p.project.partial + (row0 + row) * R + col;
        Float2 part[kMaxSegments] = {};  // all under way at once
        AFA_UNROLL
        for (int s = 0; s < kMaxSegments; ++s)
            if (s < p.project.splits && row0 + row < p.project.m)
                part[s] =
                    load_global(reinterpret_cast<const Float2*>(partial + s * p.project.m * R));
        Float2 sum{0.0f, 0.0f};
        AFA_UNROLL
        for (int s = 0; s < kMaxSegments; ++s) {
            sum.x += part[s].x;
            sum.y += part[s].y;
        }
        return pack<T>(p.inverse_keep * sum.x, p.inverse_keep * sum.y);
    };
    emit_columns<T, R>(tile, b_ring, stages, p, row0, first, last,
                       [&] { finish_rows<T, R>(tile, p, row0, column_block == 0, sum_of_splits); });
}

}  // namespace afa
