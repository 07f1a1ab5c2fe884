// Launch parameters of a ragged call. What decides the order of a sum depends on K, N and r alone,
// so that the results of a group do not depend on the other groups.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/grids.h"
#include "cuda/tiles.h"

namespace afa {

// Columns of x or dy in rounds of whole slabs, so that the partial results of several chunks have
// room in bounded scratch memory.
struct SlabRounds {
    int slabs, slabs_per_round, columns;  // columns: of a round
    int64_t partials;                     // floats
    int rounds() const { return (slabs + slabs_per_round - 1) / slabs_per_round; }
};

struct RaggedPlan {
    int rank;                          // the rank class
    bool one_pass;                     // forward kernel; else project and expand
    int segment;                       // columns of x that are summed for themselves
    int splits;                        // blocks that share the sum over K
    bool one_pass_dy;                  // dy kernel (R <= 32); else project_dy and db kernel
    int dy_segment, low_rank_segment;  // columns of dy, where dh is not summed by slab
    int dh_parts, low_rank_parts;      // partial sums of dh; of groups of ranks up to kSlabRank
    bool carries_dh;                   // the first one is the sum of the rounds of dy before
    int64_t chunk_rows;                // of a group, that one block sums over
    int64_t sums;                      // places for groups with several chunks; 0: there are none
    SlabRounds da, db;
    KernelPlan forward, project, expand, project_dy, dy, db_kernel, x;
};

// Partial results take this much traffic of what the chunk streams: 2 * R / rows.
constexpr int kChunkRowsPerRank = 32;
// Scratch memory of the partial results of dB; and of the partial sums of dh, which are dead before
// there are partial results of dA.
constexpr int64_t kRaggedDbBytes = 20 << 20, kRaggedDhBytes = 36 << 20, kRaggedDaBytes = 36 << 20;
constexpr int kPlaceBytes = 16;  // of shared memory, to find a block's group

// How much longer a kernel takes whose blocks are alone on their multiprocessors: nothing comes
// from memory while one looks for its group. How many blocks find rows, and so what the last wave
// has, only the device knows.
struct Beginnings {
    static constexpr double kAlone = 1.1;  // of some 10 tiles and a wait for each of 2 more loads
    double operator()(const KernelPlan& plan, const DeviceLimits&) const {
        return plan.blocks_per_sm > 1 ? 1.0 : kAlone;
    }
};

// As first_slot (ragged.cuh) of what is behind the last row.
inline int64_t slots_of(int64_t rows, int groups, int64_t piece_rows) {
    return rows / piece_rows + groups + 1;
}

// Of a kernel of rank class `rank` whose slabs have `slab` columns: as many at once as have room in
// `bytes`, at most `most`.
inline SlabRounds slab_rounds(int rank, int slab, int width, int64_t rows, int64_t chunk_rows,
                              int64_t bytes, int64_t most = std::numeric_limits<int>::max()) {
    const int64_t count = rows > chunk_rows ? 2 * ceil_div(rows, chunk_rows) : 0;
    const int64_t slab_bytes = count * rank * slab * kFloatBytes;
    const int64_t slabs = ceil_div(width, slab);
    const int64_t fit = slab_bytes > 0 ? bytes / slab_bytes : slabs;
    const int64_t rounds = ceil_div(slabs, clamp(fit, 1, most));
    const int64_t per_round = ceil_div(slabs, rounds);
    return {static_cast<int>(slabs), static_cast<int>(per_round),
            static_cast<int>(per_round) * slab, count * rank * per_round * slab};
}

template <int R>
RaggedPlan ragged_plan_of(const Shape& shape, int groups, Weights weights,
                          const DeviceLimits& device) {
    using Rows = RowTile<R>;
    using Outer = OuterTile<R>;
    const auto [n, r] = shape.members[0];
    RaggedPlan plan{};
    plan.rank = R;
    const int64_t tiles = slots_of(shape.m, groups, Rows::kRows);
    const int64_t busy = std::min(tiles, shape.m);  // at most so many have rows
    const int64_t columns = column_tiles(shape, 1);
    plan.segment = segment_of(shape.k);
    plan.one_pass = busy >= kOnePassRowBlocks || (shape.k <= plan.segment && columns < 4);
    plan.splits = plan.one_pass ? 1 : splits_of(busy, shape.k);

    plan.chunk_rows = kChunkRowsPerRank * R;
    plan.sums = (shape.m - 1) / plan.chunk_rows;
    const auto rounds = [&](int slab, int width, auto... limits) {
        return slab_rounds(R, slab, width, shape.m, plan.chunk_rows, limits...);
    };
    plan.da = rounds(Outer::kColumns, shape.k, kRaggedDaBytes);

    plan.dy_segment = segment_of(n);
    plan.low_rank_segment = kSlab;
    const int slabs = static_cast<int>(ceil_div(n, kSlab));
    const int64_t fit = kRaggedDhBytes / (shape.m * R * kFloatBytes);  // partial sums of dh
    plan.one_pass_dy = R <= kSlabRank;
    plan.dh_parts = plan.low_rank_parts = 1;
    if (plan.one_pass_dy) {
        plan.carries_dh = slabs > std::max<int64_t>(1, fit);
        plan.db = rounds(kSlab, n, kRaggedDbBytes,
                         plan.carries_dh ? std::max<int64_t>(1, fit - 1) : slabs);
        plan.dh_parts = plan.low_rank_parts = plan.carries_dh ? plan.db.slabs_per_round + 1 : slabs;
    } else {
        plan.db = rounds(Outer::kColumns, n, kRaggedDbBytes);
        if (busy < kWholeRowBlocks && slabs <= fit) {
            plan.dh_parts = splits_of(busy, n);
            plan.low_rank_parts = slabs;
        }
    }

    const auto with_place = [](auto bytes) {
        return [bytes](auto... arguments) { return kPlaceBytes + bytes(arguments...); };
    };
    const auto streamed = [&](const char* kernel, int64_t grid_y, const auto& bytes) {
        return streaming(kernel, Rows::kThreads, Rows::kRaggedRegisters, device, tiles, grid_y,
                         weights, with_place(bytes), Beginnings{});
    };
    plan.forward = streamed("ragged_forward", 1, Rows::forward_bytes);
    plan.project = streamed("ragged_project", plan.splits, Rows::forward_bytes);
    plan.expand = streamed("ragged_expand", clamp(ceil_div(kExpandGrid, busy), 1, columns),
                           Rows::expand_bytes);
    const auto by_slab = [&](const char* kernel, int threads, int registers, const SlabRounds& sums,
                             const auto& bytes) {
        KernelPlan found = ring(kernel, threads, registers, device,
                                slots_of(shape.m, groups, plan.chunk_rows) * sums.slabs_per_round,
                                1, bytes(3) - bytes(2), with_place(bytes), Beginnings{});
        found.launches = sums.rounds();
        return found;
    };
    if constexpr (R <= kSlabRank) {
        using Dy = DyTile<R>;
        static_assert(Dy::kColumns == kSlab);
        plan.dy = by_slab("ragged_dy", Dy::kThreads, Dy::kRaggedRegisters, plan.db, Dy::bytes);
    } else {
        plan.project_dy =
            streamed("ragged_project_dy", std::max(plan.dh_parts, plan.low_rank_parts),
                     Rows::dy_project_bytes);
        plan.db_kernel = by_slab("ragged_db", Outer::kThreads, Outer::kRaggedDbRegisters, plan.db,
                                 Outer::db_bytes);
    }
    plan.x =
        by_slab("ragged_x", Outer::kThreads, Outer::kRaggedXRegisters, plan.da, Outer::x_bytes);
    return plan;
}

inline RaggedPlan plan_ragged(const Shape& shape, int groups, Weights weights,
                              const DeviceLimits& device) {
    check_shape(shape);
    return with_rank(rank_class(shape), [&](auto rank) {
        return ragged_plan_of<rank>(shape, groups, weights, device);
    });
}

}  // namespace afa
