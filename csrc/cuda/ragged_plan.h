// Launch parameters of a ragged call. What decides the order of a sum depends on K, N and r alone,
// so that the results of a group do not depend on the other groups.
#pragma once

#include <algorithm>

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
    int rank;            // the rank class
    int64_t chunk_rows;  // of a group, that one block of the x and db kernels sums over
    int64_t sums;        // places for groups with several chunks; 0: there are none
    SlabRounds da, db;
    KernelPlan forward, dz, db_kernel, x;
};

// Partial results take this much traffic of what the chunk streams: 2 * R / rows.
constexpr int kChunkRowsPerRank = 32;
// Scratch memory of the partial results of dA, and of dB.
constexpr int64_t kRaggedPartialBytes = 16 << 20;
constexpr int kPlaceBytes = 16;  // of shared memory, to find a block's group

// As first_slot (ragged.cuh) of what is behind the last row.
inline int64_t slots_of(int64_t rows, int groups, int64_t piece_rows) {
    return rows / piece_rows + groups + 1;
}

template <int R>
SlabRounds slab_rounds(int width, int64_t rows, int64_t chunk_rows) {
    using Tile = OuterTile<R>;
    const int64_t count = rows > chunk_rows ? 2 * ceil_div(rows, chunk_rows) : 0;
    const int64_t slab_bytes = count * R * Tile::kColumns * kFloatBytes;
    const int64_t slabs = ceil_div(width, Tile::kColumns);
    const int64_t fit = slab_bytes > 0 ? kRaggedPartialBytes / slab_bytes : slabs;
    const int64_t rounds = ceil_div(slabs, std::max<int64_t>(1, fit));
    const int64_t per_round = ceil_div(slabs, rounds);
    return {static_cast<int>(slabs), static_cast<int>(per_round),
            static_cast<int>(per_round) * Tile::kColumns, count * R * per_round * Tile::kColumns};
}

template <int R>
RaggedPlan ragged_plan_of(const Shape& shape, int groups, Weights weights,
                          const DeviceLimits& device) {
    using Rows = RowTile<R>;
    using Outer = OuterTile<R>;
    const auto [n, r] = shape.members[0];
    const auto with_place = [](auto bytes) {
        return [bytes](auto... arguments) { return kPlaceBytes + bytes(arguments...); };
    };
    RaggedPlan plan{};
    plan.rank = R;
    plan.chunk_rows = kChunkRowsPerRank * R;
    plan.sums = (shape.m - 1) / plan.chunk_rows;
    plan.da = slab_rounds<R>(shape.k, shape.m, plan.chunk_rows);
    plan.db = slab_rounds<R>(n, shape.m, plan.chunk_rows);
    const int64_t tiles = slots_of(shape.m, groups, Rows::kRows),
                  chunks = slots_of(shape.m, groups, plan.chunk_rows);
    plan.forward = streaming("ragged_forward", Rows::kThreads, Rows::kRaggedRegisters, device,
                             tiles, 1, weights, with_place(Rows::forward_bytes));
    plan.dz = streaming("ragged_dz", Rows::kThreads, Rows::kRaggedRegisters, device, tiles, 1,
                        weights, with_place(Rows::dy_project_bytes));
    const auto outer = [&](const char* kernel, int registers, int slabs, const auto& bytes) {
        return ring(kernel, Outer::kThreads, registers, device, chunks * slabs, 1,
                    bytes(3) - bytes(2), bytes);
    };
    plan.db_kernel = outer("ragged_db", Outer::kDbRegisters, plan.db.slabs_per_round,
                           with_place(Outer::db_bytes));
    plan.x =
        outer("ragged_x", Outer::kXRegisters, plan.da.slabs_per_round, with_place(Outer::x_bytes));
    plan.db_kernel.launches = plan.db.rounds();
    plan.x.launches = plan.da.rounds();
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
