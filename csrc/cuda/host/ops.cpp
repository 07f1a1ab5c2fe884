#include "cuda/host/ops.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/host/call_params.h"
#include "cuda/host/device.h"
#include "cuda/host/small_kernels.h"

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

void launch_dy(const BackwardCall& call, const BackwardPlan& plan, const BackwardScratch& scratch) {
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
    }
    if (slabs == 0)
        return;
    p.adds = call.first_row > 0;
    p.m = call.shape.m;
    p.rows_per_chunk = plan.db_rows;
    p.stages = kernel.stages;
    kernel.grid_x = slabs;
    rank_kernels(call.dtype, plan.dy_rank).dy(chunks_config(kernel, call, plan.db_rows), p);
}

// dh of a lone layer.
void launch_project_dy(const BackwardCall& call, const BackwardPlan& plan,
                       const BackwardScratch& scratch) {
    rank_kernels(call.dtype, plan.dy_rank)
        .project_dy(tiles_config(plan.project_dy, call), project_dy(call, plan, scratch.dh[0]));
}

// dB of a lone layer, from h.
void launch_db(const BackwardCall& call, const BackwardPlan& plan, const BackwardScratch& scratch) {
    OuterPass p = outer_dy(call, plan.db, plan.db_rows, scratch.h);
    p.partial = scratch.db[0];
    p.adds = call.first_row > 0;
    rank_kernels(call.dtype, plan.dy_rank).db(chunks_config(plan.db, call, plan.db_rows), p);
}

void launch_x(const BackwardCall& call, const BackwardPlan& plan, const BackwardScratch& scratch,
              bool need_da) {
    OuterParams p = outer_x(call, plan.x, plan.da_rows, scratch.dz);
    p.partial = need_da ? scratch.da : nullptr;
    p.adds = call.first_row > 0;
    rank_kernels(call.dtype, plan.rank).x(chunks_config(plan.x, call, plan.da_rows), p);
}

const void* at(const void* matrix, int64_t element) {
    return matrix ? static_cast<const char*>(matrix) + element * kElementBytes : nullptr;
}

// The rows [first, first + count) of a call.
BackwardCall rows_of(const BackwardCall& call, int64_t first, int64_t count) {
    BackwardCall part = call;
    part.shape.m = count;
    part.first_row = first;
    part.x = at(call.x, first * call.x_stride);
    part.dx = const_cast<void*>(at(call.dx, first * call.shape.k));
    for (int i = 0; i < call.shape.count; ++i) {
        MemberGradients& member = part.gradients[i];
        member.dy = at(member.dy, first * member.dy_stride);
        member.z = at(member.z, first * call.shape.members[i].r);
    }
    return part;
}

// One round. Sums over rows are added to those of the rounds before it, and the last one
// leaves them to the reduce kernel.
void backward_round(const BackwardCall& call, const BackwardPlan& plan,
                    const BackwardScratch& scratch, bool last) {
    bool any_dz = false, any_da = false;
    Reduction first, second;  // behind the passes over dy, and behind all
    for (int i = 0; i < call.shape.count; ++i) {
        const MemberGradients& member = call.gradients[i];
        const bool dz = needs_dz(call, i);
        any_dz = any_dz || dz;
        any_da = any_da || member.da;
        if (dz || (member.db && !plan.one_pass_dy))
            first.add(dz_job(call, plan, scratch, i));
        if (member.db && last)
            (plan.one_pass_dy ? first : second).add(db_job(call, plan, scratch, i));
        if (member.da && last)
            second.add(da_job(call, plan, scratch, i));
    }
    if (plan.one_pass_dy)
        launch_dy(call, plan, scratch);
    else if (any_dz)
        launch_project_dy(call, plan, scratch);
    first.launch(call);
    if (!plan.one_pass_dy && call.gradients[0].db)
        launch_db(call, plan, scratch);
    if (any_dz)
        launch_x(call, plan, scratch, any_da);
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
    ForwardScratch scratch(shape, plan_forward(shape, kAnyDevice), count);
    return count.used();
}

int64_t backward_workspace(const Shape& shape) {
    Workspace count(nullptr);
    BackwardScratch scratch(shape, plan_backward(shape, kAnyDevice), count);
    return count.used();
}

void forward(const ForwardCall& given) {
    ForwardCall call = given;
    const Shape& shape = call.shape;
    const ForwardPlan plan = plan_forward(shape, call.device);
    check_call(call);
    Workspace workspace(call.workspace);
    const ForwardScratch scratch(shape, plan, workspace);

    for (int i = 0; i < shape.count; ++i) {
        const MemberOutput& out = call.outputs[i];
        check_matrix("y", out.y, out.y_stride, shape);
        check_matrix("base", out.base, out.base_stride, shape);
        check_z(out.z, shape.members[i].r, shape);
    }
    call.weights = ready_weights(call, scratch.weights);
    ForwardParams p{};
    for (int i = 0; i < kMaxMembers; ++i) {
        ForwardMember& member = p.members[i];
        member.first = kNoMember;
        if (i >= shape.count)
            continue;
        member = forward_member(call, i, call.outputs[i]);
        member.first = column_tiles(shape, i);
        member.rank0 = shape.rank0(i);
        member.ranks = shape.own_columns(i, plan.rank);
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

void backward(const BackwardCall& given) {
    BackwardCall call = given;
    const Shape& shape = call.shape;
    const BackwardPlan plan = plan_backward(shape, call.device);
    check_call(call);
    check_matrix("dx", call.dx, shape.k, shape);
    for (int i = 0; i < shape.count; ++i) {
        check_matrix("dy", call.gradients[i].dy, call.gradients[i].dy_stride, shape);
        check_z(call.gradients[i].z, shape.members[i].r, shape);
        if (!call.gradients[i].z)
            throw std::invalid_argument("z: expected that of the forward, got None (" +
                                        describe(shape) + ")");
    }
    Workspace workspace(call.workspace);
    const BackwardScratch scratch(shape, plan, workspace);
    call.weights = ready_weights(call, scratch.weights);
    for (int64_t first = 0; first < shape.m; first += plan.rows) {
        const int64_t count = std::min(plan.rows, shape.m - first);
        const BackwardCall part = rows_of(call, first, count);
        backward_round(part, plan, scratch, first + count == shape.m);
    }
}

std::vector<KernelPlan> kernels_of(const Shape& shape, const DeviceLimits& device) {
    const ForwardPlan forward = plan_forward(shape, device);
    const BackwardPlan backward = plan_backward(shape, device);
    std::vector<KernelPlan> kernels;
    if (forward.one_pass)
        kernels = {forward.forward};
    else
        kernels = {forward.project, forward.expand};
    if (backward.one_pass_dy)
        kernels.insert(kernels.end(), {backward.dy, backward.x});
    else
        kernels.insert(kernels.end(), {backward.project_dy, backward.db, backward.x});
    return kernels;
}

}  // namespace afa
