// Ragged kernels: a block finds the group that its rows belong to, and then does what the block of
// a lone call on the rows of that group would do.
//
// Every group is cut into pieces from its first row on, so that its results have the bits that they
// would have alone. The pieces of all groups lie in slots: those of a group that starts at row s
// begin at slot s / (rows of a piece) + group, which leaves room for all of them and needs no sum
// over the groups before it. A slot without a piece has a block that leaves at once.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/ragged_params.h"

namespace afa {

// Where a block is: rows [first_row, first_row + rows) of group `group`, of which it has piece
// `piece`. Rows that belong to no group are those of group `count`, of rank 0.
struct Place {
    int group, rank, piece;
    int64_t first_row, rows;
    bool exists;  // whether the piece has rows, or is the first one
};

// The row behind those of group g; never beyond x, whatever the caller has passed.
AFA_DEVICE int64_t end_of(const Groups& groups, int g) {
    if (g < 0 || g >= groups.count)
        return g < 0 ? 0 : groups.rows;
    const int64_t end = load_global(groups.ends + g * groups.ends_stride);
    return end < 0 ? 0 : end < groups.rows ? end : groups.rows;
}

AFA_DEVICE int rank_of(const Groups& groups, int g) {
    if (g >= groups.count)
        return 0;
    if (!groups.ranks)
        return groups.r;
    const int rank = load_global(groups.ranks + g * groups.ranks_stride);
    return rank < 0 ? 0 : rank < groups.r ? rank : groups.r;
}

AFA_DEVICE int64_t first_slot(int64_t first_row, int g, int64_t piece_rows) {
    return first_row / piece_rows + g;
}

// The threads of the block look at one group each.
template <int kThreads>
AFA_DEVICE Place place_of(const Groups& groups, SharedMemory& shared, int64_t slot,
                          int64_t piece_rows) {
    int* found = shared.take<int>(1);
    AFA_ROLLED
    for (int g = thread_index(); g <= groups.count; g += kThreads)
        if (first_slot(end_of(groups, g - 1), g, piece_rows) <= slot &&
            slot < first_slot(end_of(groups, g), g + 1, piece_rows))
            store_shared(found, g);
    block_sync();
    // Ends that decrease leave the slot to nobody or to several: any group will do.
    const int any = load_shared<int>(found);
    Place at{};
    at.group = any < 0 ? 0 : any < groups.count ? any : groups.count;
    at.rank = rank_of(groups, at.group);
    at.first_row = end_of(groups, at.group - 1);
    at.rows = end_of(groups, at.group) - at.first_row;
    const int64_t piece = slot - first_slot(at.first_row, at.group, piece_rows);
    at.piece = static_cast<int>(piece);
    at.exists = piece == 0 || (piece > 0 && piece * piece_rows < at.rows);
    return at;
}

// Row `row` of a matrix of T; null stays null.
template <typename T, typename V>
AFA_DEVICE V* row_of(V* matrix, int64_t row, int64_t stride) {
    using Elements = std::conditional_t<std::is_const_v<V>, const T, T>;
    return matrix ? static_cast<V*>(static_cast<Elements*>(matrix) + row * stride) : nullptr;
}

template <typename T>
AFA_DEVICE const void* element_at(const Weight& w, int64_t index) {
    return w.is_float ? static_cast<const void*>(static_cast<const float*>(w.data) + index)
                      : static_cast<const void*>(static_cast<const T*>(w.data) + index);
}

// The A of the group, kRankUnit rows at a time.
template <typename T, int R>
AFA_DEVICE void take_a(Weight (&blocks)[kMaxRank / kRankUnit], const Groups& groups,
                       const Place& at) {
    const Weight all = blocks[0];
    const int64_t start = at.rank > 0 ? at.group * groups.a_stride : 0;
    AFA_UNROLL
    for (int i = 0; i < R / kRankUnit; ++i) {
        const int left = at.rank - i * kRankUnit;
        blocks[i] = all;
        blocks[i].data = element_at<T>(all, start + i * kRankUnit * all.row_stride);
        blocks[i].rows = left < 0 ? 0 : left < kRankUnit ? left : kRankUnit;
    }
}

// The B of the group. Columns beyond its rank are not read, so that they may cut a vector.
template <typename T>
AFA_DEVICE void take_b(Weight& b, const Groups& groups, const Place& at) {
    b.data = element_at<T>(b, at.rank > 0 ? at.group * groups.b_stride : 0);
    b.cols = at.rank;
    if (groups.ranks && at.rank % (b.is_float ? kVector / 2 : kVector) != 0)
        b.in_vectors = false;
}

AFA_DEVICE const float* alpha_at(const float* alpha_t, const Groups& groups, const Place& at) {
    return alpha_t && at.rank > 0 ? alpha_t + at.group * groups.alpha_stride : alpha_t;
}
AFA_DEVICE float scaling_at(float scaling, const Groups& groups, const Place& at) {
    if (at.rank == 0)
        return 0.0f;
    return groups.scaling ? load_global(groups.scaling + at.group * groups.scaling_stride)
                          : scaling;
}

// Grid: slots of kRows rows. Rows without a branch have z = 0, y = base.
template <typename T, int R>
AFA_KERNEL(RowTile<R>::kThreads, RowTile<R>::kRaggedBlocks)
ragged_forward_kernel(const RaggedForwardParams p) {
    follow_previous_kernel();
    using Tile = RowTile<R>;
    SharedMemory shared;
    const Place at = place_of<Tile::kThreads>(p.groups, shared, block_x(), Tile::kRows);
    const int64_t row0 = static_cast<int64_t>(at.piece) * Tile::kRows;
    if (!at.exists || row0 >= at.rows)
        return;
    ForwardParams call = p.call;
    call.count = 1;
    call.members[1].first = call.members[2].first = kNoMember;
    call.project.wide = row_of<T>(call.project.wide, at.first_row, call.project.wide_stride);
    call.project.m = at.rows;
    if (at.rank == 0)
        call.project.w = 0;
    call.project.dropout.first_row = at.first_row;
    take_a<T, R>(call.project.narrow, p.groups, at);
    ForwardMember& member = call.members[0];
    take_b<T>(member.b, p.groups, at);
    member.base = row_of<T>(member.base, at.first_row, member.base_stride);
    member.y = row_of<T>(member.y, at.first_row, member.y_stride);
    member.z = row_of<T>(member.z, at.first_row, member.z_cols);
    member.alpha_t = alpha_at(member.alpha_t, p.groups, at);
    member.scaling = scaling_at(member.scaling, p.groups, at);
    forward_rows<T, R>(call, shared, row0);
}

// dz and h of the 16 rows of this warp, of kColumns columns from col0 on whose sums of dh are in
// `sums`. `row0` is the first row of the warp among those of x.
template <typename T, int R, int kColumns>
AFA_DEVICE void finish_dz(const float* sums, const RaggedDzParams& p, int64_t row0, int rows,
                          int col0, float alpha_t, float scale) {
    constexpr int kPairs = kColumns / 2;
    AFA_ROLLED
    for (int i = lane_index(); i < 16 * kPairs; i += kWarpSize) {
        const int row = i / kPairs, col = i % kPairs * 2;
        if (row >= rows)
            break;
        const Float2 sum = load_shared<Float2>(sums + row * pitch(kColumns) + col);
        const Float2 z =
            unpack<T>(load_pair(static_cast<const T*>(p.z), row0 + row, p.z_cols, col0 + col));
        const ValueSlope low = anneal_by_id(p.activation, z.x, alpha_t);
        const ValueSlope high = anneal_by_id(p.activation, z.y, alpha_t);
        const int64_t index = (row0 + row) * R + col0 + col;
        if (p.dz)
            store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(p.dz) + index),
                         pack<T>(scale * low.slope * sum.x, scale * high.slope * sum.y));
        if (p.h)
            store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(p.h) + index),
                         pack<T>(low.value, high.value));
    }
}

// Grid: slots of kRows rows. dz = scale * phi'(z) * dy B and h = phi(z), of rows without a branch
// zeros.
template <typename T, int R>
AFA_KERNEL(RowTile<R>::kThreads, RowTile<R>::kRaggedBlocks)
ragged_dz_kernel(const RaggedDzParams p) {
    follow_previous_kernel();
    using Tile = RowTile<R>;
    constexpr int kColumns = R < 64 ? R : 64;  // that are finished at a time
    static_assert(Tile::kRows * pitch(kColumns) * kFloatBytes <= 2 * Tile::kWide * kElementBytes);
    SharedMemory shared;
    const Place at = place_of<Tile::kThreads>(p.groups, shared, block_x(), Tile::kRows);
    const int64_t row0 = static_cast<int64_t>(at.piece) * Tile::kRows;
    if (!at.exists || row0 >= at.rows)
        return;
    ProjectParams call = p.call;
    call.wide = row_of<T>(call.wide, at.first_row, call.wide_stride);
    call.m = at.rows;
    if (at.rank == 0)
        call.w = 0;
    if (at.rank <= kSlabRank)
        call.segment = p.rank_segment;
    take_b<T>(call.narrow[0], p.groups, at);

    T* wide_ring = shared.take<T>(call.stages * Tile::kWide);
    const auto narrow_ring =
        NarrowRing<T, R, true>::take(shared, call.stages, call.rounded, call.staged);
    float acc[R / 8][4];
    project<T, R, true>(acc, call, wide_ring, narrow_ring, row0, 0);
    block_sync();  // the ring has been read by all: it becomes a tile of sums
    const float alpha_t = alpha_of(alpha_at(p.alpha_t, p.groups, at));
    const float scale = scaling_at(p.scaling, p.groups, at) * p.inverse_keep;
    const int warp_row = warp_index() * 16;
    const int64_t left = at.rows - row0 - warp_row;
    float* sums = reinterpret_cast<float*>(wide_ring) + warp_row * pitch(kColumns);
    float* own = sums + lane_index() / 4 * pitch(kColumns) + lane_index() % 4 * 2;
    AFA_UNROLL
    for (int c = 0; c < R; c += kColumns) {
        AFA_UNROLL
        for (int j = 0; j < kColumns / 8; ++j) {
            const float (&sum)[4] = acc[c / 8 + j];
            store_shared(own + j * 8, Float2{sum[0], sum[1]});
            store_shared(own + 8 * pitch(kColumns) + j * 8, Float2{sum[2], sum[3]});
        }
        warp_sync();
        finish_dz<T, R, kColumns>(sums, p, at.first_row + row0 + warp_row,
                                  static_cast<int>(left < 16 ? left : 16), c, alpha_t, scale);
        warp_sync();
    }
}

// Chunks of a group; one without a branch has one, which has no rows.
AFA_DEVICE int64_t chunks_of(const Groups& groups, const Place& at) {
    return at.rank == 0 || at.rows <= groups.chunk_rows
               ? 1
               : (at.rows + groups.chunk_rows - 1) / groups.chunk_rows;
}

// The place of the partial result of chunk `chunk` of `chunks`, at least two, of a group. All
// chunks but the last one of a group have chunk_rows rows, so that no two of them begin among the
// same chunk_rows rows of x; nor do the last ones, as they have others before them.
AFA_DEVICE int64_t partial_index(const Groups& groups, int64_t first_row, int64_t chunk,
                                 int64_t chunks) {
    return (first_row / groups.chunk_rows + chunk) * 2 + (chunk == chunks - 1);
}

template <typename T>
AFA_DEVICE void store_element(void* out, Output type, int64_t index, float value) {
    if (type == Output::fp32)
        store_global(static_cast<float*>(out) + index, value);
    else
        store_global(static_cast<uint16_t*>(out) + index,
                     static_cast<uint16_t>(pack<T>(value, 0.0f)));
}

// Stores scale times the accumulators of add_outer into the (rows, cols) result of a group; zeros
// beyond its rank.
template <typename T, int kLeft, int kRight>
AFA_DEVICE void store_result(void* out, Output type, const float (&acc)[kLeft / 16][kRight / 8][4],
                             int row0, int rows, int col0, int cols, int live_rows, int live_cols,
                             float scale) {
    AFA_UNROLL
    for (int i = 0; i < kLeft / 16; ++i)
        AFA_UNROLL
    for (int j = 0; j < kRight / 8; ++j)
        AFA_UNROLL
    for (int e = 0; e < 4; ++e) {
        const int row = row0 + i * 16 + lane_index() / 4 + e / 2 * 8;
        const int col = col0 + j * 8 + lane_index() % 4 * 2 + e % 2;
        if (row < rows && col < cols)
            store_element<T>(out, type, static_cast<int64_t>(row) * cols + col,
                             row < live_rows && col < live_cols ? scale * acc[i][j][e] : 0.0f);
    }
}

// The result of group `group`.
template <typename T>
AFA_DEVICE void* result_of(const GroupSums& sums, const Groups& groups, int group) {
    const int64_t start = static_cast<int64_t>(group) * groups.r * sums.w;
    return sums.type == Output::fp32 ? static_cast<void*>(static_cast<float*>(sums.out) + start)
                                     : static_cast<void*>(static_cast<T*>(sums.out) + start);
}

// Grid: (slots of chunk_rows rows) x (slabs of the round), slabs fastest. dB = dy^T h.
template <typename T, int R>
AFA_KERNEL(OuterTile<R>::kThreads)
ragged_db_kernel(const RaggedOuterParams p) {
    follow_previous_kernel();
    using Tile = OuterTile<R>;
    const GroupSums& sums = p.sums;
    SharedMemory shared;
    const Place at =
        place_of<Tile::kThreads>(p.groups, shared, block_x() / sums.slabs, p.groups.chunk_rows);
    const int64_t chunks = chunks_of(p.groups, at);
    if (!at.exists || at.group == p.groups.count || at.piece >= chunks)
        return;
    OuterParams call = p.call;
    call.wide = row_of<T>(call.wide, at.first_row, call.wide_stride);
    call.narrow = row_of<T>(call.narrow, at.first_row, R);
    call.m = at.rank > 0 ? at.rows : 0;
    const float scale = scaling_at(sums.scaling, p.groups, at);
    db_pass<T, R>(call, shared, sums.first_slab + block_x() % sums.slabs, at.piece,
                  [&](const auto& db, int col) {
                      if (chunks == 1)
                          store_result<T, Tile::kSlice, R>(result_of<T>(sums, p.groups, at.group),
                                                           sums.type, db, col, sums.w, 0,
                                                           p.groups.r, sums.w, at.rank, scale);
                      else
                          store_outer<Tile::kSlice, R>(
                              sums.partial +
                                  partial_index(p.groups, at.first_row, at.piece, chunks) *
                                      sums.columns * R,
                              db, col - sums.first_column, sums.columns, 0, R, false);
                  });
}

// The same of x: dx = dz A, of rows without a branch zeros, and dA = dz^T x.
template <typename T, int R>
AFA_KERNEL(OuterTile<R>::kThreads)
ragged_x_kernel(const RaggedOuterParams p) {
    follow_previous_kernel();
    using Tile = OuterTile<R>;
    const GroupSums& sums = p.sums;
    SharedMemory shared;
    const Place at =
        place_of<Tile::kThreads>(p.groups, shared, block_x() / sums.slabs, p.groups.chunk_rows);
    if (!at.exists)
        return;
    OuterParams call = p.call;
    call.wide = row_of<T>(call.wide, at.first_row, call.wide_stride);
    call.narrow = row_of<T>(call.narrow, at.first_row, R);
    call.dx = row_of<T>(call.dx, at.first_row, call.w);
    call.dropout.first_row = at.first_row;
    call.m = at.rank > 0 || call.dx ? at.rows : 0;
    // x is read where there is a partial result, whose place `store` decides.
    call.partial = at.rank > 0 ? static_cast<float*>(sums.out) : nullptr;
    take_a<T, R>(call.a, p.groups, at);
    const int64_t chunks = chunks_of(p.groups, at);
    x_pass<T, R>(call, shared, sums.first_slab + block_x() % sums.slabs, at.piece,
                 [&](const auto& da, int col) {
                     if (!sums.out || at.group == p.groups.count || at.piece >= chunks)
                         return;
                     if (chunks == 1)
                         store_result<T, R, Tile::kSlice>(result_of<T>(sums, p.groups, at.group),
                                                          sums.type, da, 0, p.groups.r, col, sums.w,
                                                          at.rank, sums.w, 1.0f);
                     else
                         store_outer<R, Tile::kSlice>(
                             sums.partial +
                                 partial_index(p.groups, at.first_row, at.piece, chunks) * R *
                                     sums.columns,
                             da, 0, R, col - sums.first_column, sums.columns, false);
                 });
}

}  // namespace afa
