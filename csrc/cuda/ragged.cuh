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
#include "cuda/reduce.cuh"

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

// The lone call on the rows of the group.
template <typename T, int R>
AFA_DEVICE void take_rows(ProjectParams& p, const Groups& groups, const Place& at) {
    p.wide = row_of<T>(p.wide, at.first_row, p.wide_stride);
    p.partial = p.partial ? p.partial + at.first_row * R : nullptr;
    p.m = at.rows;
    p.w = at.rank > 0 ? p.w : 0;
    p.dropout.first_row = at.first_row;
    if (p.narrow_transposed)
        take_b<T>(p.narrow[0], groups, at);
    else
        take_a<T, R>(p.narrow, groups, at);
}
template <typename T, int R>
AFA_DEVICE void take_rows(ForwardParams& p, const Groups& groups, const Place& at) {
    p.project.narrow_transposed = false;
    take_rows<T, R>(p.project, groups, at);
    p.count = 1;
    p.members[1].first = p.members[2].first = kNoMember;
    ForwardMember& member = p.members[0];
    take_b<T>(member.b, groups, at);
    member.base = row_of<T>(member.base, at.first_row, member.base_stride);
    member.y = row_of<T>(member.y, at.first_row, member.y_stride);
    member.z = row_of<T>(member.z, at.first_row, member.z_cols);
    member.alpha_t = alpha_at(member.alpha_t, groups, at);
    member.scaling = scaling_at(member.scaling, groups, at);
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
    take_rows<T, R>(call, p.groups, at);
    forward_rows<T, R>(call, shared, row0);
}

// Grid: (slots of kRows rows, column blocks). The same from the partial sums of z.
template <typename T, int R>
AFA_KERNEL(RowTile<R>::kThreads, RowTile<R>::kRaggedBlocks)
ragged_expand_kernel(const RaggedForwardParams p) {
    follow_previous_kernel();
    using Tile = RowTile<R>;
    SharedMemory shared;
    const Place at = place_of<Tile::kThreads>(p.groups, shared, block_x(), Tile::kRows);
    const int64_t row0 = static_cast<int64_t>(at.piece) * Tile::kRows;
    if (!at.exists || row0 >= at.rows)
        return;
    ForwardParams call = p.call;
    take_rows<T, R>(call, p.groups, at);
    expand_rows<T, R>(call, shared, row0, block_y());
}

// Grid: (slots of kRows rows, splits). Partial sums of z = x A^T, or of dh = dy B; zeros of rows
// without a branch.
template <typename T, int R, bool kTransposed>
AFA_KERNEL(RowTile<R>::kThreads, RowTile<R>::kRaggedBlocks)
ragged_project_kernel(const RaggedProjectParams p) {
    follow_previous_kernel();
    using Tile = RowTile<R>;
    SharedMemory shared;
    const Place at = place_of<Tile::kThreads>(p.groups, shared, block_x(), Tile::kRows);
    const int64_t row0 = static_cast<int64_t>(at.piece) * Tile::kRows;
    if (!at.exists || row0 >= at.rows)
        return;
    ProjectParams call = p.call;
    call.narrow_transposed = kTransposed;
    take_rows<T, R>(call, p.groups, at);
    if (at.rank <= kSlabRank)
        call.segment = p.low_rank_segment;
    if (static_cast<int64_t>(block_y()) * call.segment >= p.call.w)
        return;  // ranks with longer segments have fewer of them
    project_rows<T, R, kTransposed>(call, shared, row0, block_y());
}

// Grid: slots of kRowsOfPiece rows. dz from the partial sums of dh, and h; of rows without a branch
// dz = 0.
template <typename T>
AFA_KERNEL(kReduceThreads)
ragged_rows_kernel(const RaggedRowsParams p) {
    follow_previous_kernel();
    SharedMemory shared;
    const Place at = place_of<kReduceThreads>(p.groups, shared, block_x(), kRowsOfPiece);
    const int64_t row0 = static_cast<int64_t>(at.piece) * kRowsOfPiece;
    if (!at.exists || row0 >= at.rows)
        return;
    SumRowsJob job = p.job;
    if (at.rank == 0)
        job.partial = nullptr;
    if (at.rank <= kSlabRank)
        job.count = p.low_rank_count;
    job.alpha_t = alpha_at(job.alpha_t, p.groups, at);
    job.scale = scaling_at(p.scaling, p.groups, at) * p.inverse_keep;
    const int64_t half = job.cols / 2, first = (at.first_row + row0) * half;
    const int64_t left = at.rows - row0;
    const int pairs = static_cast<int>((left < kRowsOfPiece ? left : kRowsOfPiece) * half);
    AFA_ROLLED
    for (int i = thread_index(); i < pairs; i += kReduceThreads)
        sum_rows<T>(job, first + i);
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

// The result of group `group`.
template <typename T>
AFA_DEVICE void* result_of(const GroupSums& sums, const Groups& groups, int group) {
    const int64_t start = static_cast<int64_t>(group) * groups.r * sums.w;
    return sums.type == Output::fp32 ? static_cast<void*>(static_cast<float*>(sums.out) + start)
                                     : static_cast<void*>(static_cast<T*>(sums.out) + start);
}

// What stores the sums of a chunk of dB: the result of a group that has one chunk, or a partial
// result.
template <typename T, int kSlice, int R>
AFA_DEVICE void store_db(const float (&db)[kSlice / 16][R / 8][4], const Groups& groups,
                         const GroupSums& sums, const Place& at, int col) {
    const int64_t chunks = chunks_of(groups, at);
    if (chunks == 1)
        store_result<T, kSlice, R>(result_of<T>(sums, groups, at.group), sums.type, db, col, sums.w,
                                   0, groups.r, sums.w, at.rank,
                                   scaling_at(sums.scaling, groups, at));
    else
        store_outer<kSlice, R>(
            sums.partial + partial_index(groups, at.first_row, at.piece, chunks) * sums.columns * R,
            db, col - sums.first_column, sums.columns, 0, R, false);
}
template <typename T, int kSlice, int R>
AFA_DEVICE void store_da(const float (&da)[R / 16][kSlice / 8][4], const Groups& groups,
                         const GroupSums& sums, const Place& at, int col) {
    const int64_t chunks = chunks_of(groups, at);
    if (chunks == 1)
        store_result<T, R, kSlice>(result_of<T>(sums, groups, at.group), sums.type, da, 0, groups.r,
                                   col, sums.w, at.rank, sums.w, 1.0f);
    else
        store_outer<R, kSlice>(
            sums.partial + partial_index(groups, at.first_row, at.piece, chunks) * R * sums.columns,
            da, 0, R, col - sums.first_column, sums.columns, false);
}

// Whether the block at this place has nothing to sum or to clear.
AFA_DEVICE bool has_no_sum(const Groups& groups, const Place& at) {
    return at.group == groups.count || at.piece >= chunks_of(groups, at);
}

// Grid: (slots of chunk_rows rows) x (slabs of the round), slabs fastest. dh by slab, of groups
// with a branch, and dB = dy^T h.
template <typename T, int R>
AFA_KERNEL(DyTile<R>::kThreads, DyTile<R>::kRaggedBlocks)
ragged_dy_kernel(const RaggedDyParams p) {
    follow_previous_kernel();
    using Tile = DyTile<R>;
    SharedMemory shared;
    const Place at =
        place_of<Tile::kThreads>(p.groups, shared, block_x() / p.sums.slabs, p.groups.chunk_rows);
    if (!at.exists || has_no_sum(p.groups, at))
        return;
    const int place = block_x() % p.sums.slabs, slab = p.sums.first_slab + place;
    DyParams call = p.call;
    call.m = at.rank > 0 ? at.rows : 0;
    DyMember member = p.call.members[0];
    take_b<T>(member.b, p.groups, at);
    member.dy = row_of<T>(member.dy, at.first_row, member.dy_stride);
    member.z = row_of<T>(member.z, at.first_row, member.z_cols);
    member.alpha_t = alpha_at(member.alpha_t, p.groups, at);
    float* slab_dh = member.dh + (place * p.groups.rows + at.first_row) * R;
    dy_pass<T, R>(call, member, slab_dh, shared, slab, at.piece, [&](const auto& db, int col) {
        if (p.sums.out)
            store_db<T, Tile::kSlice, R>(db, p.groups, p.sums, at, col);
    });
}

// Grid: (slots of chunk_rows rows) x (slabs of the round), slabs fastest. dB = dy^T h.
template <typename T, int R>
AFA_KERNEL(OuterTile<R>::kThreads)
ragged_db_kernel(const RaggedOuterParams p) {
    follow_previous_kernel();
    using Tile = OuterTile<R>;
    SharedMemory shared;
    const Place at =
        place_of<Tile::kThreads>(p.groups, shared, block_x() / p.sums.slabs, p.groups.chunk_rows);
    if (!at.exists || has_no_sum(p.groups, at))
        return;
    OuterParams call = p.call;
    call.wide = row_of<T>(call.wide, at.first_row, call.wide_stride);
    call.narrow = row_of<T>(call.narrow, at.first_row, R);
    call.m = at.rank > 0 ? at.rows : 0;
    db_pass<T, R>(call, shared, p.sums.first_slab + block_x() % p.sums.slabs, at.piece,
                  [&](const auto& db, int col) {
                      store_db<T, Tile::kSlice, R>(db, p.groups, p.sums, at, col);
                  });
}

// The same of x: dA = dz^T x, and dx = dz A, of rows without a branch zeros. Where kAddsDx,
// dx += dz A, and rows without a branch keep what they hold.
template <typename T, int R, bool kAddsDx>
AFA_KERNEL(OuterTile<R>::kThreads, 1)
ragged_x_kernel(const RaggedOuterParams p) {
    follow_previous_kernel();
    using Tile = OuterTile<R>;
    SharedMemory shared;
    const Place at =
        place_of<Tile::kThreads>(p.groups, shared, block_x() / p.sums.slabs, p.groups.chunk_rows);
    const bool no_sum = !p.sums.out || has_no_sum(p.groups, at);
    const bool writes_dx = kAddsDx ? at.rank > 0 : p.call.dx != nullptr;
    if (!at.exists || (no_sum && !writes_dx))
        return;
    OuterParams call = p.call;
    call.wide = row_of<T>(call.wide, at.first_row, call.wide_stride);
    call.narrow = row_of<T>(call.narrow, at.first_row, R);
    call.dx = row_of<T>(call.dx, at.first_row, call.w);
    call.dropout.first_row = at.first_row;
    call.m = at.rank > 0 || writes_dx ? at.rows : 0;
    // x is read where there is a partial result, whose place store_da decides.
    call.partial = at.rank > 0 ? static_cast<float*>(p.sums.out) : nullptr;
    take_a<T, R>(call.a, p.groups, at);
    x_pass<T, R, kAddsDx>(call, shared, p.sums.first_slab + block_x() % p.sums.slabs, at.piece,
                          [&](const auto& da, int col) {
                              if (!no_sum)
                                  store_da<T, Tile::kSlice, R>(da, p.groups, p.sums, at, col);
                          });
}

}  // namespace afa
