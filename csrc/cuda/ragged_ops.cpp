#include "cuda/ragged_ops.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/check_call.h"
#include "cuda/operands.h"
#include "cuda/ragged_launch.h"
#include "cuda/ragged_plan.h"
#include "cuda/reduction.h"
#include "cuda/scratch.h"
#include "cuda/workspace.h"

namespace afa {
namespace {

// Scratch memory does not depend on the device or the groups.
constexpr DeviceLimits kAnyDevice{1, 99 * 1024, 100 * 1024};

struct RaggedScratch {
    Element *dz, *h;  // [M, R]; h is first z, where that is recomputed
    float *da, *db;

    RaggedScratch(const Shape& shape, const RaggedPlan& plan, Workspace& w)
        : dz(w.take<Element>(shape.m * plan.rank)), h(w.take<Element>(shape.m * plan.rank)),
          da(w.take<float>(plan.da.partials)), db(w.take<float>(plan.db.partials)) {}
};

const RaggedKernels& ragged_kernels(DType dtype, int rank) {
    switch (rank) {
    case 16:
        return ragged16_kernels(dtype);
    case 32:
        return ragged32_kernels(dtype);
    case 64:
        return ragged64_kernels(dtype);
    default:
        return ragged128_kernels(dtype);
    }
}

// A weight of the first group, in vectors only if those of all groups are.
Weight of_groups(Weight w, int64_t group_stride) {
    w.in_vectors = w.in_vectors && group_stride % (w.is_float ? kVector / 2 : kVector) == 0;
    return w;
}
Weight a_of(const BranchCall& call, const Groups& groups) {
    return of_groups(weight_a(call, 0), groups.a_stride);
}
Weight b_of(const BranchCall& call, const Groups& groups) {
    return of_groups(weight_b(call, 0), groups.b_stride);
}

// Ranks that differ may cut a vector of B.
bool rounds_b(const BranchCall& call, const Groups& groups) {
    return is_rounded(b_of(call, groups)) || groups.ranks;
}
Weights weights_of(const BranchCall& call, const Groups& groups) {
    const bool rounded = is_rounded(a_of(call, groups)) || rounds_b(call, groups);
    return rounded ? Weights::rounded : Weights::as_they_are;
}

RaggedPlan plan_of(const BranchCall& call, const Groups& groups) {
    if (groups.count < 1)
        throw std::invalid_argument("groups: expected at least one");
    check_call(call);
    return plan_ragged(call.shape, groups.count, weights_of(call, groups), call.device);
}

Groups filled(Groups groups, const BranchCall& call, const RaggedPlan& plan) {
    groups.rows = call.shape.m;
    groups.r = call.shape.members[0].r;
    groups.chunk_rows = plan.chunk_rows;
    return groups;
}

DropoutParams dropout_of(const BranchCall& call) { return {call.seed, call.threshold, 0}; }

void launch_forward(const BranchCall& call, const Groups& groups, const RaggedPlan& plan,
                    const MemberOutput& out, int z_cols, int column_tiles) {
    RaggedForwardParams p{};
    p.groups = groups;
    ProjectParams& project = p.call.project;
    project.wide = call.x;
    project.wide_stride = call.x_stride;
    project.narrow[0] = a_of(call, groups);
    project.rounded = weights_of(call, groups) == Weights::rounded;
    project.staged = plan.forward.staged;
    project.m = call.shape.m;
    project.w = call.shape.k;
    project.segment = segment_of(call.shape.k);
    project.splits = 1;
    project.stages = plan.forward.stages;
    project.dropout = dropout_of(call);
    ForwardMember& member = p.call.members[0];
    member.ranks = plan.rank;
    member.b = b_of(call, groups);
    member.base = out.base;
    member.base_stride = out.base_stride;
    member.y = out.y;
    member.y_stride = out.y_stride;
    member.z = out.z;
    member.z_cols = z_cols;
    member.alpha_t = call.members[0].alpha_t;
    member.activation = call.members[0].activation;
    member.scaling = call.members[0].scaling;
    p.call.count = 1;
    p.call.column_tiles = column_tiles;
    p.call.inverse_keep = inverse_keep(call.threshold);
    ragged_kernels(call.dtype, plan.rank).forward({plan.forward, call.shape, call.stream}, p);
}

void launch_dz(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
               const RaggedScratch& scratch) {
    const MemberGradients& gradients = call.gradients[0];
    const bool need_dz = needs_dz(call, 0);
    const int n = call.shape.members[0].n;
    RaggedDzParams p{};
    p.groups = groups;
    p.call.wide = gradients.dy;
    p.call.wide_stride = gradients.dy_stride;
    p.call.narrow[0] = b_of(call, groups);
    p.call.narrow_transposed = true;
    p.call.rounded = weights_of(call, groups) == Weights::rounded;
    p.call.staged = plan.dz.staged;
    p.call.m = call.shape.m;
    p.call.w = need_dz ? n : 0;
    p.call.segment = segment_of(n);
    p.call.splits = 1;
    p.call.stages = plan.dz.stages;
    p.z = gradients.z ? gradients.z : scratch.h;
    p.z_cols = gradients.z ? groups.r : plan.rank;
    p.dz = need_dz ? scratch.dz : nullptr;
    p.h = gradients.db ? scratch.h : nullptr;
    p.alpha_t = call.members[0].alpha_t;
    p.activation = call.members[0].activation;
    p.rank_segment = kSlab;
    p.scaling = call.members[0].scaling;
    p.inverse_keep = inverse_keep(call.threshold);
    ragged_kernels(call.dtype, plan.rank).dz({plan.dz, call.shape, call.stream}, p);
}

// Round `round` of a sum over rows; without slabs where it has none.
GroupSums sums_of(const SlabRounds& rounds, int round, int width, void* out, bool is_float,
                  float* partial) {
    GroupSums sums{};
    sums.out = out;
    sums.partial = partial;
    sums.type = is_float ? Output::fp32 : Output::t;
    sums.first_slab = round * rounds.slabs_per_round;
    sums.slabs = std::max(0, std::min(rounds.slabs_per_round, rounds.slabs - sums.first_slab));
    sums.columns = rounds.columns;
    sums.first_column = round * rounds.columns;
    sums.w = width;
    return sums;
}

LaunchConfig slots_config(KernelPlan kernel, const RaggedBackwardCall& call, const Groups& groups,
                          const GroupSums& sums) {
    kernel.grid_x = slots_of(call.shape.m, groups.count, groups.chunk_rows) * sums.slabs;
    return {kernel, call.shape, call.stream};
}

void launch_db(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
               const RaggedScratch& scratch, const GroupSums& sums) {
    RaggedOuterParams p{};
    p.groups = groups;
    p.sums = sums;
    p.call.wide = call.gradients[0].dy;
    p.call.wide_stride = call.gradients[0].dy_stride;
    p.call.narrow = scratch.h;
    p.call.m = call.shape.m;
    p.call.rows_per_chunk = plan.chunk_rows;
    p.call.w = call.shape.members[0].n;
    p.call.stages = plan.db_kernel.stages;
    ragged_kernels(call.dtype, plan.rank).db(slots_config(plan.db_kernel, call, groups, sums), p);
}

void launch_x(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
              const RaggedScratch& scratch, const GroupSums& sums) {
    RaggedOuterParams p{};
    p.groups = groups;
    p.sums = sums;
    p.call.wide = call.x;
    p.call.wide_stride = call.x_stride;
    p.call.narrow = scratch.dz;
    p.call.a[0] = a_of(call, groups);
    p.call.rounded = is_rounded(p.call.a[0]);
    p.call.dx = call.dx;
    p.call.m = call.shape.m;
    p.call.rows_per_chunk = plan.chunk_rows;
    p.call.w = call.shape.k;
    p.call.stages = plan.x.stages;
    p.call.dropout = dropout_of(call);
    ragged_kernels(call.dtype, plan.rank).x(slots_config(plan.x, call, groups, sums), p);
}

void launch_sum(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
                const GroupSums& da, const GroupSums& db) {
    const auto blocks = [&](const GroupSums& sums) {
        return sums.out && sums.slabs > 0
                   ? reduce_blocks(static_cast<int64_t>(groups.r) * sums.columns)
                   : 0;
    };
    RaggedSumParams p{groups, da, db, plan.rank, blocks(da), blocks(db)};
    LaunchConfig config{{}, call.shape, call.stream};
    config.plan.kernel = "ragged_sum";
    config.plan.grid_x = plan.sums * (p.da_blocks + p.db_blocks);
    config.plan.threads = kReduceThreads;
    config.plan.shared_bytes = kPlaceBytes;
    if (config.plan.grid_x > 0)
        launch_ragged_sum(call.dtype, config, p);
}

}  // namespace

int64_t ragged_workspace(const Shape& shape) {
    Workspace count(nullptr);
    RaggedScratch scratch(shape, plan_ragged(shape, 1, Weights::as_they_are, kAnyDevice), count);
    return count.used();
}

void ragged_forward(const RaggedForwardCall& call) {
    const RaggedPlan plan = plan_of(call, call.groups);
    const MemberOutput& out = call.outputs[0];
    check_matrix("y", out.y, out.y_stride, call.shape);
    check_matrix("base", out.base, out.base_stride, call.shape);
    check_z(out.z, call.shape.members[0].r, call.shape);
    launch_forward(call, filled(call.groups, call, plan), plan, out, call.shape.members[0].r,
                   column_tiles(call.shape, call.shape.count));
}

void ragged_backward(const RaggedBackwardCall& call) {
    const RaggedPlan plan = plan_of(call, call.groups);
    const Groups groups = filled(call.groups, call, plan);
    const MemberGradients& gradients = call.gradients[0];
    check_matrix("dx", call.dx, call.shape.k, call.shape);
    check_matrix("dy", gradients.dy, gradients.dy_stride, call.shape);
    check_z(gradients.z, call.shape.members[0].r, call.shape);
    Workspace workspace(call.workspace);
    const RaggedScratch scratch(call.shape, plan, workspace);
    if (!gradients.z)
        launch_forward(call, groups, plan, {nullptr, 0, nullptr, 0, scratch.h}, plan.rank, 0);
    launch_dz(call, groups, plan, scratch);
    const int rounds = std::max(plan.da.rounds(), plan.db.rounds());
    for (int round = 0; round < rounds; ++round) {
        GroupSums db = sums_of(plan.db, round, call.shape.members[0].n, gradients.db,
                               gradients.db_is_float, scratch.db);
        db.scaling = call.members[0].scaling;
        const GroupSums da =
            sums_of(plan.da, round, call.shape.k, gradients.da, gradients.da_is_float, scratch.da);
        if (gradients.db && db.slabs > 0)
            launch_db(call, groups, plan, scratch, db);
        if (needs_dz(call, 0) && da.slabs > 0)
            launch_x(call, groups, plan, scratch, da);
        launch_sum(call, groups, plan, da, db);
    }
}

std::vector<KernelPlan> ragged_kernels_of(const Shape& shape, int groups, Weights weights,
                                          const DeviceLimits& device) {
    const RaggedPlan plan = plan_ragged(shape, groups, weights, device);
    return {plan.forward, plan.dz, plan.db_kernel, plan.x};
}

}  // namespace afa
