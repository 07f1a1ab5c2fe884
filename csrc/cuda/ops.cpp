#include "cuda/ops.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/call_params.h"
#include "cuda/reduction.h"
#include "cuda/scratch.h"
#include "cuda/tiles.h"

namespace afa {
namespace {

LaunchConfig config_of(const KernelPlan& plan, const BranchCall& call) {
    return {plan, call.shape, call.stream};
}

// The plan of a kernel that walks down chunks of rows, or of one with a block per tile of rows, for
// the rows of a round.
LaunchConfig chunks_config(KernelPlan plan, const BranchCall& call, int64_t rows_per_chunk) {
    plan.grid_y = static_cast<int>((call.shape.m + rows_per_chunk - 1) / rows_per_chunk);
    return config_of(plan, call);
}
LaunchConfig tiles_config(KernelPlan plan, const BranchCall& call) {
    plan.grid_x = (call.shape.m + kTileRows - 1) / kTileRows;
    return config_of(plan, call);
}

// z as the forward computed it, bit for bit: the same segments, summed in the same order.
void recompute_z(const BranchCall& call, const ForwardPlan& plan, const BackwardScratch& scratch) {
    rank_kernels(call.dtype, plan.rank)
        .project(tiles_config(plan.project, call),
                 project_x(call, plan, plan.project, scratch.partial_z));
    Reduction reduction;
    for (int i = 0; i < call.shape.count; ++i)
        reduction.add(z_job(call, plan, scratch, i));
    reduction.launch(call);
}

// dB of a lone layer, by blocks of the x kernel, which has `chunks` chunks of x.
void fill_db(DbParams& p, const BackwardCall& call, const BackwardPlan& plan,
             const BackwardScratch& scratch, int chunks, bool sums) {
    static_cast<OuterPass&>(p) = outer_dy(call, plan.x, plan.db_rows, scratch.h);
    p.partial = scratch.db[0];
    p.adds = call.first_row > 0;
    p.slabs = static_cast<int>(plan.db_slabs);
    p.chunks = db_chunks_of(chunks);
    p.columns = static_cast<int>(db_columns(p.slabs, p.chunks, chunks));
    p.r = call.shape.members[0].r;
    p.scaling = call.members[0].scaling;
    if (sums) {
        p.sums = {plan.db_chunks, p.chunks, scratch.arrived + plan.x_slabs * plan.x.threads};
        p.result = db_result(call, 0);
    }
}

void launch_dy(const BackwardCall& call, const BackwardPlan& plan, const BackwardScratch& scratch,
               bool last, bool need_da) {
    DyParams p{};
    KernelPlan kernel = plan.dy;
    int slabs = 0;
    for (int i = 0; i < kMaxMembers; ++i) {
        DyMember& member = p.members[i];
        member.first = i < call.shape.count ? slabs : kNoMember;
        if (i >= call.shape.count || !(needs_dz(call, i) || call.gradients[i].db))
            continue;
        member = dy_member(call, i);
        member.first = slabs;
        slabs += plan.dh_parts[i];
        member.dh = needs_dz(call, i) ? scratch.dh[i] : nullptr;
        member.db = call.gradients[i].db ? scratch.db[i] : nullptr;
        if (last && plan.dy.sums > 0 && member.db)
            member.result = db_result(call, i);
    }
    if (slabs == 0)
        return;
    p.adds = call.first_row > 0;
    p.m = call.shape.m;
    p.rows_per_chunk = plan.db_rows;
    p.stages = kernel.stages;
    if (last && need_da && plan.x.sums > 1) {
        p.arrived = scratch.arrived;
        p.arrived_count = static_cast<int>(counters(plan));
    }
    kernel.grid_x = slabs;
    rank_kernels(call.dtype, plan.dy_rank).dy(chunks_config(kernel, call, plan.db_rows), p);
}

// dh of a lone layer, or dz and h.
void launch_project_dy(const BackwardCall& call, const BackwardPlan& plan,
                       const BackwardScratch& scratch, bool last) {
    ProjectDyParams p{};
    p.project = project_dy(call, plan.project_dy, plan.segment, std::max(1, plan.dh_parts[0]),
                           scratch.dh[0]);
    p.rows = dz_job(call, plan, scratch, 0);
    if (last && plan.x.sums > 1) {
        p.arrived = scratch.arrived;
        p.arrived_count = static_cast<int>(counters(plan));
    }
    const RankKernels& kernels = rank_kernels(call.dtype, plan.dy_rank);
    kernels.project_dy(tiles_config(plan.project_dy, call), p);
}

// What a backward needs of the x kernel, which makes dB at R = 64 only, and whether the sums over
// rows are to be ready after it.
struct Needed {
    bool dz, da, db, sums_da, sums_db;
};

void launch_x(const BackwardCall& call, const BackwardPlan& plan, const BackwardScratch& scratch,
              const Needed& needed) {
    const bool makes_dz = plan.x.dh_sums > 0;
    OuterParams p = outer_x(call, plan.x, plan.da_rows, makes_dz ? nullptr : scratch.dz);
    if (makes_dz)
        p.dz = dz_job(call, plan, scratch, 0);
    p.partial = needed.da ? scratch.da : nullptr;
    p.adds = call.first_row > 0;
    LaunchConfig config = chunks_config(plan.x, call, plan.da_rows);
    const int chunks = config.plan.grid_y;
    if (needed.da && needed.sums_da) {
        p.sums = {plan.x.sums, chunks, scratch.arrived};
        fill_da(p.da, call);
    }
    p.db.first_column = needed.dz ? static_cast<int>(plan.x_slabs) : 0;
    if (needed.db)
        fill_db(p.db, call, plan, scratch, chunks, needed.sums_db);
    config.plan.grid_x = p.db.first_column + p.db.columns;
    rank_kernels(call.dtype, plan.rank).x(config, p);
}

const void* at(const void* matrix, int64_t element) {
    return matrix ? static_cast<const char*>(matrix) + element * kElementBytes : nullptr;
}

// The rows [first, first + count) of a call; z that has to be made is made in scratch memory.
BackwardCall rows_of(const BackwardCall& call, int64_t first, int64_t count,
                     const BackwardScratch& scratch) {
    BackwardCall part = call;
    part.shape.m = count;
    part.first_row = first;
    part.x = at(call.x, first * call.x_stride);
    part.dx = const_cast<void*>(at(call.dx, first * call.shape.k));
    for (int i = 0; i < call.shape.count; ++i) {
        MemberGradients& member = part.gradients[i];
        member.dy = at(member.dy, first * member.dy_stride);
        member.z = member.z ? at(member.z, first * call.shape.members[i].r) : scratch.z[i];
    }
    return part;
}

// One round, after z. Sums over rows are added to those of the rounds before it, and written by the
// last one.
void backward_round(const BackwardCall& call, const BackwardPlan& plan,
                    const BackwardScratch& scratch, bool last) {
    const bool apart = !plan.one_pass_dy;  // dh and dB, by two passes over dy
    Needed needed{};
    for (int i = 0; i < call.shape.count; ++i) {
        needed.dz = needed.dz || needs_dz(call, i);
        needed.da = needed.da || call.gradients[i].da;
    }
    needed.db = apart && call.gradients[0].db;
    needed.sums_da = last && plan.x.sums > 0;
    // The counters of whoever comes last are zeroed by the project_dy kernel.
    const bool counts = needed.dz || plan.db_chunks == 1;
    needed.sums_db = last && (apart ? plan.x.sums > 0 && counts : plan.dy.sums > 0);
    if (!apart)
        launch_dy(call, plan, scratch, last, needed.da);
    else if (needed.dz)
        launch_project_dy(call, plan, scratch, last);

    const bool has_dz = plan.x.dh_sums > 0 || (apart && plan.dh_parts[0] == 0);
    Reduction first, second;
    for (int i = 0; i < call.shape.count; ++i) {
        const MemberGradients& member = call.gradients[i];
        if (needs_dz(call, i) ? !has_dz : needed.db)
            first.add(dz_job(call, plan, scratch, i));
        if (member.db && last && !needed.sums_db)
            (apart || plan.x.dh_sums > 0 ? second : first).add(db_job(call, plan, scratch, i));
        if (member.da && last && !needed.sums_da)
            second.add(da_job(call, plan, scratch, i));
    }
    first.launch(call);
    if (needed.dz || needed.db)
        launch_x(call, plan, scratch, needed);
    second.launch(call);
}

}  // namespace

const RankKernels& rank_kernels(DType dtype, int rank) {
    switch (rank) {
    case 16:
        return rank16_kernels(dtype);
    case 32:
        return rank32_kernels(dtype);
    default:
        return rank64_kernels(dtype);
    }
}

int64_t forward_workspace(const Shape& shape) {
    Workspace count(nullptr);
    ForwardScratch scratch(shape, plan_forward(shape, Weights::as_they_are, kAnyDevice), count);
    return count.used();
}

int64_t backward_workspace(const Shape& shape, bool recompute_z) {
    Workspace count(nullptr);
    BackwardScratch scratch(shape, plan_forward(shape, Weights::as_they_are, kAnyDevice),
                            plan_backward(shape, Weights::as_they_are, kAnyDevice), recompute_z,
                            count);
    return count.used();
}

void forward(const ForwardCall& call) {
    const Shape& shape = call.shape;
    const ForwardPlan plan = plan_forward(shape, weights_of(call), call.device);
    check_call(call);
    Workspace workspace(call.workspace);
    const ForwardScratch scratch(shape, plan, workspace);

    ForwardParams p{};
    for (int i = 0; i < kMaxMembers; ++i) {
        ForwardMember& member = p.members[i];
        member.first = kNoMember;
        if (i >= shape.count)
            continue;
        const MemberOutput& out = call.outputs[i];
        check_matrix("y", out.y, out.y_stride, shape);
        check_matrix("base", out.base, out.base_stride, shape);
        check_z(out.z, shape.members[i].r, shape);
        member = forward_member(call, i, out);
        member.first = column_tiles(shape, i);
        member.rank0 = shape.rank0(i);
        member.ranks = (i + 1 < shape.count ? shape.rank0(i + 1) : plan.rank) - member.rank0;
    }
    p.count = shape.count;
    p.column_tiles = column_tiles(shape, shape.count);
    p.column_blocks = plan.expand.grid_y;
    p.inverse_keep = inverse_keep(call.threshold);
    const RankKernels& kernels = rank_kernels(call.dtype, plan.rank);
    if (plan.one_pass) {
        p.project = project_x(call, plan, plan.forward, nullptr);
        kernels.forward(config_of(plan.forward, call), p);
    } else {
        kernels.project(config_of(plan.project, call),
                        project_x(call, plan, plan.project, scratch.partial));
        p.project = project_x(call, plan, plan.expand, scratch.partial);
        kernels.expand(config_of(plan.expand, call), p);
    }
}

void backward(const BackwardCall& call) {
    const Shape& shape = call.shape;
    const ForwardPlan forward = plan_forward(shape, weights_of(call), call.device);
    const BackwardPlan plan = plan_backward(shape, weights_of(call), call.device);
    check_call(call);
    check_matrix("dx", call.dx, shape.k, shape);
    for (int i = 0; i < shape.count; ++i) {
        check_matrix("dy", call.gradients[i].dy, call.gradients[i].dy_stride, shape);
        check_z(call.gradients[i].z, shape.members[i].r, shape);
    }
    const bool remake_z = !call.gradients[0].z;
    Workspace workspace(call.workspace);
    const BackwardScratch scratch(shape, forward, plan, remake_z, workspace);
    for (int64_t first = 0; first < shape.m; first += plan.rows) {
        const int64_t count = std::min(plan.rows, shape.m - first);
        const BackwardCall part = rows_of(call, first, count, scratch);
        if (remake_z)
            recompute_z(part, forward, scratch);
        backward_round(part, plan, scratch, first + count == shape.m);
    }
}

std::vector<KernelPlan> kernels_of(const Shape& shape, Weights weights,
                                   const DeviceLimits& device) {
    const ForwardPlan forward = plan_forward(shape, weights, device);
    const BackwardPlan backward = plan_backward(shape, weights, device);
    std::vector<KernelPlan> kernels;
    if (forward.one_pass)
        kernels = {forward.forward};
    else
        kernels = {forward.project, forward.expand};
    if (backward.one_pass_dy)
        kernels.push_back(backward.dy);
    else
        kernels.push_back(backward.project_dy);
    kernels.push_back(backward.x);
    return kernels;
}

}  // namespace afa
