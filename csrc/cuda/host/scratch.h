// What a forward and a backward keep in their scratch memory.
#pragma once

#include "cuda/host/plan.h"
#include "cuda/host/workspace.h"

namespace afa {

// Limits that any supported GPU meets: scratch memory must not depend on the device.
constexpr DeviceLimits kAnyDevice{1, 99 * 1024, 100 * 1024};

struct Element {  // of T
    uint16_t bits;
};

// Room for every A, one below the other, and every B, whether they have to be packed or not.
struct PackedWeights {
    Element *a, *b[kMaxMembers] = {};

    PackedWeights(const Shape& s, Workspace& w)
        : a(w.take<Element>(static_cast<int64_t>(rank_class(s)) * s.k)) {
        for (int i = 0; i < s.count; ++i)
            b[i] = w.take<Element>(static_cast<int64_t>(s.members[i].n) * largest_rank_class(s));
    }
};

struct ForwardScratch {
    PackedWeights weights;
    float* partial;

    ForwardScratch(const Shape& s, const ForwardPlan& plan, Workspace& w)
        : weights(s, w),
          partial(plan.one_pass ? nullptr : w.take<float>(plan.splits * s.m * plan.rank)) {}
};

struct BackwardScratch {  // weights, db and da for the whole call, the others for one round
    PackedWeights weights;
    Element *dz, *h;
    float* da;
    float *dh[kMaxMembers] = {}, *db[kMaxMembers] = {};

    BackwardScratch(const Shape& s, const BackwardPlan& plan, Workspace& w) : weights(s, w) {
        const int64_t rows = plan.rows;
        dz = w.take<Element>(rows * plan.rank);
        h = w.take<Element>(plan.one_pass_dy ? 0 : rows * plan.rank);
        int64_t parts = 0;
        for (int i = 0; i < s.count; ++i)
            parts += plan.dh_parts[i];
        dh[0] = w.take<float>(parts * rows * plan.dy_rank);
        for (int i = 1; i < s.count; ++i)
            dh[i] = dh[0] ? dh[i - 1] + plan.dh_parts[i - 1] * rows * plan.dy_rank : nullptr;
        for (int i = 0; i < s.count; ++i)
            db[i] =
                w.take<float>(static_cast<int64_t>(plan.db_chunks) * s.members[i].n * plan.dy_rank);
        da = w.take<float>(static_cast<int64_t>(plan.da_chunks) * plan.rank * s.k);
    }
};

}  // namespace afa
