// What a forward and a backward keep in their scratch memory.
#pragma once

#include <algorithm>

#include "cuda/plan.h"
#include "cuda/workspace.h"

namespace afa {

struct Element {  // of T
    uint16_t bits;
};

struct ForwardScratch {
    Element *a, *b;
    float* partial;

    ForwardScratch(const Shape& s, const ForwardPlan& plan, Workspace& w)
        : a(w.take<Element>(static_cast<int64_t>(plan.rank) * s.k)),
          b(w.take<Element>(static_cast<int64_t>(plan.rank) * s.n)),
          partial(plan.one_pass ? nullptr : w.take<float>(plan.splits * s.m * plan.rank)) {}
};

struct BackwardScratch {  // a, b, db and da for the whole call, the others for one round
    Element *a, *b, *dz, *h, *z;
    float *dh, *db, *da;

    BackwardScratch(const Shape& s, const ForwardPlan& forward, const BackwardPlan& plan,
                    bool recompute_z, Workspace& w) {
        const int64_t rank = plan.rank, rows = plan.rows;
        a = w.take<Element>(rank * s.k);
        b = w.take<Element>(rank * s.n);
        dz = w.take<Element>(rows * rank);
        h = w.take<Element>(plan.one_pass_dy ? 0 : rows * rank);
        z = w.take<Element>(recompute_z ? rows * s.r : 0);
        // The partial sums of a recomputed z are dead before those of dh exist.
        const int64_t parts = std::max(plan.dh_parts, recompute_z ? forward.splits : 0);
        dh = w.take<float>(parts * rows * rank);
        db = w.take<float>(plan.db_chunks * s.n * rank);
        da = w.take<float>(plan.da_chunks * rank * s.k);
    }
};

}  // namespace afa
