#include "cuda/ragged_ops.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/call_params.h"
#include "cuda/ragged_launch.h"
#include "cuda/ragged_plan.h"
#include "cuda/reduction.h"
#include "cuda/scratch.h"
#include "cuda/workspace.h"

namespace afa {
namespace {

int64_t partial_z(const Shape& shape, const RaggedPlan& plan) {
    return plan.one_pass ? 0 : plan.splits * shape.m * plan.rank;
}

struct RaggedScratch {
    Element *dz, *h;  // [M, R]; h is first z, where that is recomputed
    // Partial sums. Those of z are dead before those of dh exist, and these before those of dA.
    float *z, *dh, *da, *db;

    RaggedScratch(const Shape& shape, const RaggedPlan& plan, bool recompute_z, Workspace& w) {
        const int64_t rows = shape.m * plan.rank;
        dz = w.take<Element>(rows);
        h = w.take<Element>(recompute_z || !plan.one_pass_dy ? rows : 0);
        z = dh = da =
            w.take<float>(std::max({std::max(plan.dh_parts, plan.low_rank_parts) * rows,
                                    recompute_z ? partial_z(shape, plan) : 0, plan.da.partials}));
        db = w.take<float>(plan.db.partials);
    }
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

// x A^T with the A of the groups.
ProjectParams project_groups(const BranchCall& call, const Groups& groups, const RaggedPlan& plan,
                             const KernelPlan& kernel, float* partial) {
    ProjectParams p = project_x(call, plan, kernel, partial);
    p.narrow[0] = a_of(call, groups);
    p.rounded = weights_of(call, groups) == Weights::rounded;
    return p;
}

// z and y; without columns z alone.
void launch_forward(const BranchCall& call, const Groups& groups, const RaggedPlan& plan,
                    const MemberOutput& out, int z_cols, int columns, float* partial) {
    RaggedForwardParams p{};
    p.groups = groups;
    ForwardMember& member = p.call.members[0];
    member = forward_member(call, 0, out);
    member.ranks = plan.rank;
    member.b = b_of(call, groups);
    member.z_cols = z_cols;
    p.call.count = 1;
    p.call.column_tiles = columns;
    p.call.column_blocks = columns > 0 ? plan.expand.grid_y : 1;
    p.call.inverse_keep = inverse_keep(call.threshold);
    const RaggedKernels& kernels = ragged_kernels(call.dtype, plan.rank);
    if (plan.one_pass) {
        p.call.project = project_groups(call, groups, plan, plan.forward, nullptr);
        kernels.forward({plan.forward, call.shape, call.stream}, p);
        return;
    }
    const RaggedProjectParams project{
        groups, project_groups(call, groups, plan, plan.project, partial), plan.segment};
    kernels.project({plan.project, call.shape, call.stream}, project);
    p.call.project = project_groups(call, groups, plan, plan.expand, partial);
    KernelPlan expand = plan.expand;
    expand.grid_y = p.call.column_blocks;
    kernels.expand({expand, call.shape, call.stream}, p);
}

void launch_project_dy(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
                       const RaggedScratch& scratch) {
    const KernelPlan& kernel = plan.project_dy;
    RaggedProjectParams p{groups,
                          project_dy(call, kernel, plan.dy_segment, kernel.grid_y, scratch.dh),
                          plan.low_rank_segment};
    p.call.narrow[0] = b_of(call, groups);
    p.call.rounded = weights_of(call, groups) == Weights::rounded;
    ragged_kernels(call.dtype, plan.rank).project_dy({kernel, call.shape, call.stream}, p);
}

// dz and, for the db kernel, h.
void launch_rows(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
                 const RaggedScratch& scratch, const void* z, int z_cols) {
    RaggedRowsParams p{};
    p.groups = groups;
    SumRowsJob& job = p.job;
    job.partial = needs_dz(call, 0) ? scratch.dh : nullptr;
    // Of a last round that is shorter than the others, so many have been written.
    const int missing =
        plan.carries_dh ? plan.db.rounds() * plan.db.slabs_per_round - plan.db.slabs : 0;
    job.count = plan.dh_parts - missing;
    job.partial_stride = job.cols = job.rank_class = plan.rank;
    job.z = z;
    job.dz = needs_dz(call, 0) ? scratch.dz : nullptr;
    job.h = call.gradients[0].db && !plan.one_pass_dy ? scratch.h : nullptr;
    job.alpha_t = call.members[0].alpha_t;
    job.m = call.shape.m;
    job.r = z_cols;
    job.activation = call.members[0].activation;
    p.low_rank_count = plan.low_rank_parts - missing;
    p.scaling = call.members[0].scaling;
    p.inverse_keep = inverse_keep(call.threshold);
    if (!job.dz && !job.h)
        return;
    const int64_t slots = slots_of(call.shape.m, groups.count, kRowsOfPiece);
    launch_ragged_rows(call.dtype, blocks_config(call, "ragged_rows", slots, kPlaceBytes), p);
}

// Round `round` of a sum over rows; without slabs where it has none, and without a place for
// partial results where every group has one chunk.
GroupSums sums_of(const SlabRounds& rounds, int round, int width, void* out, bool is_float,
                  float* partial) {
    GroupSums sums{};
    sums.out = out;
    sums.partial = rounds.partials > 0 ? partial : nullptr;
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

// The partial sum of dh that the first slab of a round of dy makes.
int first_dh(const RaggedPlan& plan, const GroupSums& sums) {
    return !plan.carries_dh ? sums.first_slab : sums.first_slab > 0 ? 1 : 0;
}

void launch_dy(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
               const RaggedScratch& scratch, const GroupSums& sums, const void* z, int z_cols) {
    RaggedDyParams p{};
    p.groups = groups;
    p.sums = sums;
    DyMember& member = p.call.members[0];
    member = dy_member(call, 0);
    member.b = b_of(call, groups);
    member.z = z;
    member.z_cols = z_cols;
    if (needs_dz(call, 0))
        member.dh = scratch.dh + first_dh(plan, sums) * call.shape.m * plan.rank;
    member.db = static_cast<float*>(sums.out);  // whether there is one; its place is in the sums
    p.call.m = call.shape.m;
    p.call.rows_per_chunk = plan.chunk_rows;
    p.call.stages = plan.dy.stages;
    ragged_kernels(call.dtype, plan.rank).dy(slots_config(plan.dy, call, groups, sums), p);
}

// Adds the partial sums of dh of a round of dy to those of the rounds before, in the order in which
// dz takes them. Rows without a branch have no sums: they get what nothing reads.
void launch_carry(const RaggedBackwardCall& call, const RaggedPlan& plan,
                  const RaggedScratch& scratch, const GroupSums& sums) {
    SumWeightJob job{};
    job.partial = scratch.dh;
    job.out = scratch.dh;
    job.type = Output::fp32;
    job.count = first_dh(plan, sums) + sums.slabs;
    job.rows = call.shape.m;
    job.rows_stride = call.shape.m * plan.rank;
    job.cols = job.partial_cols = plan.rank;
    job.scale = 1.0f;
    Reduction reduction;
    reduction.add(job);
    reduction.launch(call);
}

void launch_db(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
               const RaggedScratch& scratch, const GroupSums& sums) {
    RaggedOuterParams p{groups, {}, sums};
    static_cast<OuterPass&>(p.call) = outer_dy(call, plan.db_kernel, plan.chunk_rows, scratch.h);
    ragged_kernels(call.dtype, plan.rank).db(slots_config(plan.db_kernel, call, groups, sums), p);
}

void launch_x(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
              const RaggedScratch& scratch, const GroupSums& sums) {
    RaggedOuterParams p{groups, outer_x(call, plan.x, plan.chunk_rows, scratch.dz), sums};
    p.call.a[0] = a_of(call, groups);
    p.call.rounded = is_rounded(p.call.a[0]);
    const RaggedKernels& kernels = ragged_kernels(call.dtype, plan.rank);
    (call.adds_dx ? kernels.x_into : kernels.x)(slots_config(plan.x, call, groups, sums), p);
}

void launch_sum(const RaggedBackwardCall& call, const Groups& groups, const RaggedPlan& plan,
                const GroupSums& da, const GroupSums& db) {
    const auto blocks = [&](const GroupSums& sums) {
        return sums.out && sums.slabs > 0
                   ? reduce_blocks(static_cast<int64_t>(groups.r) * sums.columns)
                   : 0;
    };
    RaggedSumParams p{groups, da, db, plan.rank, blocks(da), blocks(db)};
    const int64_t all = plan.sums * (p.da_blocks + p.db_blocks);
    if (all > 0)
        launch_ragged_sum(call.dtype, blocks_config(call, "ragged_sum", all, kPlaceBytes), p);
}

}  // namespace

int64_t ragged_forward_workspace(const Shape& shape, int groups) {
    return partial_z(shape, plan_ragged(shape, groups, Weights::as_they_are, kAnyDevice)) *
           kFloatBytes;
}

int64_t ragged_backward_workspace(const Shape& shape, int groups, bool recompute_z) {
    Workspace count(nullptr);
    RaggedScratch scratch(shape, plan_ragged(shape, groups, Weights::as_they_are, kAnyDevice),
                          recompute_z, count);
    return count.used();
}

void ragged_forward(const RaggedForwardCall& call) {
    const RaggedPlan plan = plan_of(call, call.groups);
    const MemberOutput& out = call.outputs[0];
    check_matrix("y", out.y, out.y_stride, call.shape);
    check_matrix("base", out.base, out.base_stride, call.shape);
    check_z(out.z, call.shape.members[0].r, call.shape);
    launch_forward(call, filled(call.groups, call, plan), plan, out, call.shape.members[0].r,
                   column_tiles(call.shape, 1), static_cast<float*>(call.workspace));
}

// As backward_round of ops.cpp: dh, dz, then the sums over rows, one round of columns after the
// other. The dy kernel makes dh and dB in one pass, so that its rounds come before dz.
void ragged_backward(const RaggedBackwardCall& call) {
    const RaggedPlan plan = plan_of(call, call.groups);
    const Groups groups = filled(call.groups, call, plan);
    const MemberGradients& gradients = call.gradients[0];
    const int n = call.shape.members[0].n;
    const bool need_dz = needs_dz(call, 0);
    check_matrix("dx", call.dx, call.shape.k, call.shape);
    check_matrix("dy", gradients.dy, gradients.dy_stride, call.shape);
    check_z(gradients.z, call.shape.members[0].r, call.shape);
    Workspace workspace(call.workspace);
    const RaggedScratch scratch(call.shape, plan, !gradients.z, workspace);
    const void* z = gradients.z ? gradients.z : scratch.h;
    const int z_cols = gradients.z ? groups.r : plan.rank;
    if (!gradients.z)
        launch_forward(call, groups, plan, {nullptr, 0, nullptr, 0, scratch.h}, z_cols, 0,
                       scratch.z);
    const auto db_of = [&](int round) {
        GroupSums db = sums_of(plan.db, round, n, gradients.db, gradients.db_is_float, scratch.db);
        db.scaling = call.members[0].scaling;
        return db;
    };
    const GroupSums none{};
    const bool dy_rounds = plan.one_pass_dy && plan.db.rounds() > 1;
    for (int round = 0; plan.one_pass_dy && round < plan.db.rounds(); ++round) {
        launch_dy(call, groups, plan, scratch, db_of(round), z, z_cols);
        if (dy_rounds)
            launch_sum(call, groups, plan, none, db_of(round));
        if (plan.carries_dh && need_dz && round + 1 < plan.db.rounds())
            launch_carry(call, plan, scratch, db_of(round));
    }
    if (!plan.one_pass_dy && need_dz)
        launch_project_dy(call, groups, plan, scratch);
    launch_rows(call, groups, plan, scratch, z, z_cols);
    for (int round = 0; round < std::max(plan.da.rounds(), plan.db.rounds()); ++round) {
        const GroupSums db = dy_rounds ? none : db_of(round);
        const GroupSums da =
            sums_of(plan.da, round, call.shape.k, gradients.da, gradients.da_is_float, scratch.da);
        if (!plan.one_pass_dy && gradients.db && db.slabs > 0)
            launch_db(call, groups, plan, scratch, db);
        if (need_dz && da.slabs > 0)
            launch_x(call, groups, plan, scratch, da);
        launch_sum(call, groups, plan, da, db);
    }
}

std::vector<KernelPlan> ragged_kernels_of(const Shape& shape, int groups, Weights weights,
                                          const DeviceLimits& device) {
    const RaggedPlan plan = plan_ragged(shape, groups, weights, device);
    std::vector<KernelPlan> kernels;
    if (plan.one_pass)
        kernels = {plan.forward};
    else
        kernels = {plan.project, plan.expand};
    if (plan.one_pass_dy)
        kernels.push_back(plan.dy);
    else
        kernels.insert(kernels.end(), {plan.project_dy, plan.db_kernel});
    kernels.push_back(plan.x);
    return kernels;
}

}  // namespace afa
