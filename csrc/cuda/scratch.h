// What a forward and a backward keep in their scratch memory.
#pragma once

#include <algorithm>

#include "cuda/plan.h"
#include "cuda/workspace.h"

namespace afa {

// Limits that any supported GPU meets: scratch memory must not depend on the device.
constexpr DeviceLimits kAnyDevice{1, 99 * 1024, 100 * 1024};

struct Element {  // of T
    uint16_t bits;
};

struct ForwardScratch {
    float* partial;

    ForwardScratch(const Shape& s, const ForwardPlan& plan, Workspace& w)
        : partial(plan.one_pass ? nullptr : w.take<float>(plan.splits * s.m * plan.rank)) {}
};

// Of the x kernel, one for each thread of a slab's place, whether they are needed or not.
inline int64_t counters(const BackwardPlan& plan) {
    return (plan.x_slabs + plan.db_slabs) * plan.x.threads;
}

struct BackwardScratch {  // db and da for the whole call, the others for one round
    Element *dz, *h;
    float *partial_z, *da;
    uint32_t* arrived;  // counters of the x kernel
    Element* z[kMaxMembers] = {};
    float *dh[kMaxMembers] = {}, *db[kMaxMembers] = {};

    BackwardScratch(const Shape& s, const ForwardPlan& forward, const BackwardPlan& plan,
                    bool recompute_z, Workspace& w) {
        const int64_t rows = plan.rows;
        dz = w.take<Element>(plan.x.dh_sums > 0 ? 0 : rows * plan.rank);
        h = w.take<Element>(plan.one_pass_dy ? 0 : rows * plan.rank);
        for (int i = 0; i < s.count && recompute_z; ++i)
            z[i] = w.take<Element>(rows * s.members[i].r);
        int64_t parts = 0;
        for (int i = 0; i < s.count; ++i)
            parts += plan.dh_parts[i];
        const int64_t sums = parts * rows * plan.dy_rank;
        const int64_t sums_z = recompute_z ? forward.splits * rows * plan.rank : 0;
        // The partial sums of a recomputed z are dead before those of dh exist.
        partial_z = dh[0] = w.take<float>(std::max(sums, sums_z));
        for (int i = 1; i < s.count; ++i)
            dh[i] = dh[0] ? dh[i - 1] + plan.dh_parts[i - 1] * rows * plan.dy_rank : nullptr;
        for (int i = 0; i < s.count; ++i)
            db[i] =
                w.take<float>(static_cast<int64_t>(plan.db_chunks) * s.members[i].n * plan.dy_rank);
        da = w.take<float>(static_cast<int64_t>(plan.da_chunks) * plan.rank * s.k);
        arrived = w.take<uint32_t>(counters(plan));
    }
};

}  // namespace afa
