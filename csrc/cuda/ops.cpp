#include "cuda/ops.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/check_call.h"
#include "cuda/scratch.h"
#include "cuda/tiles.h"

namespace afa {
namespace {

constexpr int kSmallThreads = 128;  // threads of the reduce and pack kernels
// Limits that any supported GPU meets: scratch memory must not depend on the device.
constexpr DeviceLimits kAnyDevice{1, 99 * 1024, 100 * 1024};

DropoutParams dropout_of(const BranchCall& call) {
    return {call.seed, call.threshold, call.first_row};
}

float inverse_keep(int threshold) { return 256.0f / static_cast<float>(256 - threshold); }

int small_blocks(int64_t threads) {
    return static_cast<int>((threads + kSmallThreads - 1) / kSmallThreads);
}

LaunchConfig small_config(const char* kernel, int64_t blocks, const BranchCall& call) {
    LaunchConfig config{{}, call.shape, call.stream};
    config.plan.kernel = kernel;
    config.plan.grid_x = blocks;
    config.plan.threads = kSmallThreads;
    return config;
}

// A and B as the kernels that stream them read them.
struct Packed {
    const void *a, *b;
    int64_t a_stride, b_stride;
};

Weight weight(const BranchCall& call, const WeightOperand& w, int64_t rows, int cols) {
    const bool in_tiles = !w.is_float && call.shape.r == rank_class(call.shape.r) &&
                          w.col_stride == 1 && w.row_stride % kVector == 0 && aligned(w.data);
    return {w.data, w.row_stride, w.col_stride, w.is_float, in_tiles, rows, cols};
}
Weight weight_a(const BranchCall& call) { return weight(call, call.a, call.shape.r, call.shape.k); }
Weight weight_b(const BranchCall& call) { return weight(call, call.b, call.shape.n, call.shape.r); }

// Uses A and B where they lie if they are what the kernels stream, and copies them into scratch
// memory otherwise; one that no kernel of the call streams is left out.
Packed pack_operands(const BranchCall& call, int rank, bool streams_a, bool streams_b,
                     Element* a_copy, Element* b_copy) {
    const Shape& s = call.shape;
    const Weight a = weight_a(call), b = weight_b(call);
    Packed packed{call.a.data, call.b.data, call.a.row_stride, call.b.row_stride};
    PackParams p{};
    int b_blocks = 0;
    if (streams_a && !a.in_tiles) {
        p.a = {a, a_copy, rank, s.k};
        p.a_blocks = small_blocks(static_cast<int64_t>(rank) * s.k / 2);
        packed.a = a_copy;
        packed.a_stride = s.k;
    }
    if (streams_b && !b.in_tiles) {
        p.b = {b, b_copy, s.n, rank};
        b_blocks = small_blocks(static_cast<int64_t>(s.n) * rank / 2);
        packed.b = b_copy;
        packed.b_stride = rank;
    }
    if (p.a_blocks + b_blocks > 0)
        launch_pack(call.dtype, small_config("pack", p.a_blocks + b_blocks, call), p);
    return packed;
}

LaunchConfig config_of(const KernelPlan& plan, const BranchCall& call) {
    return {plan, call.shape, call.stream};
}

// The plan of a kernel that walks down chunks of rows, or of one with a block per tile of rows, for
// the rows of a round.
LaunchConfig chunks_config(KernelPlan plan, const BranchCall& call, int64_t rows_per_chunk) {
    plan.grid_y = static_cast<int>((call.shape.m + rows_per_chunk - 1) / rows_per_chunk);
    return config_of(plan, call);
}
LaunchConfig tiles_config(KernelPlan plan, const BranchCall& call, int rank) {
    plan.grid_x = (call.shape.m + tile_rows(rank) - 1) / tile_rows(rank);
    return config_of(plan, call);
}

ProjectParams project_x(const BranchCall& call, const Packed& packed, const ForwardPlan& plan,
                        float* partial) {
    ProjectParams p{};
    p.wide = call.x;
    p.wide_stride = call.x_stride;
    p.narrow = packed.a;
    p.narrow_stride = packed.a_stride;
    p.partial = partial;
    p.m = call.shape.m;
    p.w = call.shape.k;
    p.segment = plan.segment;
    p.splits = plan.splits;
    p.stages = plan.project.stages;
    p.dropout = dropout_of(call);
    return p;
}

void launch_reduce_jobs(const BranchCall& call, ReduceParams& p) {
    p.rows_blocks = small_blocks(p.rows.m * p.rows.rank_class / 2);
    p.db_blocks = p.db.partial ? small_blocks(p.db.rows * p.db.cols) : 0;
    const int da_blocks = p.da.partial ? small_blocks(p.da.rows * p.da.cols) : 0;
    const int64_t blocks = static_cast<int64_t>(p.rows_blocks) + p.db_blocks + da_blocks;
    if (blocks > 0)
        launch_reduce(call.dtype, small_config("reduce", blocks, call), p);
}

// z as the forward computed it, bit for bit: the same segments, summed in the same order.
void recompute_z(const BranchCall& call, const Packed& packed, const ForwardPlan& plan,
                 float* partial, void* z) {
    rank_kernels(call.dtype, plan.rank)
        .project(tiles_config(plan.project, call, plan.rank),
                 project_x(call, packed, plan, partial));
    ReduceParams p{};
    p.rows.partial = partial;
    p.rows.count = plan.splits;
    p.rows.z_out = z;
    p.rows.m = call.shape.m;
    p.rows.r = call.shape.r;
    p.rows.rank_class = plan.rank;
    p.rows.scale = inverse_keep(call.threshold);
    launch_reduce_jobs(call, p);
}

// dh, and with it dB or (R >= 64) h.
void launch_dy_passes(const BackwardCall& call, const BackwardPlan& plan, const Packed& packed,
                      const void* z, const BackwardScratch& scratch, bool need_dz) {
    const RankKernels& kernels = rank_kernels(call.dtype, plan.rank);
    if (plan.one_pass_dy) {
        DyParams p{};
        p.dy = call.dy;
        p.dy_stride = call.dy_stride;
        p.b = weight_b(call);
        p.z = z;
        p.alpha_t = call.alpha_t;
        p.dh = need_dz ? scratch.dh : nullptr;
        p.db = call.db ? scratch.db : nullptr;
        p.adds = call.first_row > 0;
        p.m = call.shape.m;
        p.rows_per_chunk = plan.db_rows;
        p.n = call.shape.n;
        p.r = call.shape.r;
        p.stages = plan.dy.stages;
        p.activation = call.activation;
        kernels.dy(chunks_config(plan.dy, call, plan.db_rows), p);
    } else if (need_dz) {
        ProjectParams p{};
        p.wide = call.dy;
        p.wide_stride = call.dy_stride;
        p.narrow = packed.b;
        p.narrow_stride = packed.b_stride;
        p.narrow_transposed = true;
        p.partial = scratch.dh;
        p.m = call.shape.m;
        p.w = call.shape.n;
        p.segment = plan.segment;
        p.splits = plan.dh_parts;
        p.stages = plan.project_dy.stages;
        kernels.project_dy(tiles_config(plan.project_dy, call, plan.rank), p);
    }
}

SumWeightJob db_job(const BackwardCall& call, const BackwardPlan& plan,
                    const BackwardScratch& scratch) {
    const Shape& s = call.shape;
    const Output type = call.db_is_float ? Output::fp32 : Output::t;
    return {scratch.db,  call.db,
            type,        plan.db_chunks,
            s.n,         static_cast<int64_t>(s.n) * plan.rank,
            s.r,         plan.rank,
            call.scaling};
}

SumWeightJob da_job(const BackwardCall& call, const BackwardPlan& plan,
                    const BackwardScratch& scratch) {
    const Shape& s = call.shape;
    const Output type = call.da_is_float ? Output::fp32 : Output::t;
    return {scratch.da, call.da, type, plan.da_chunks, s.r, static_cast<int64_t>(s.k) * plan.rank,
            s.k,        s.k,     1.0f};
}

void launch_db(const BackwardCall& call, const BackwardPlan& plan, const BackwardScratch& scratch) {
    OuterParams p{};
    p.wide = call.dy;
    p.wide_stride = call.dy_stride;
    p.narrow = scratch.h;
    p.partial = scratch.db;
    p.adds = call.first_row > 0;
    p.m = call.shape.m;
    p.rows_per_chunk = plan.db_rows;
    p.w = call.shape.n;
    p.stages = plan.db.stages;
    rank_kernels(call.dtype, plan.rank).db(chunks_config(plan.db, call, plan.db_rows), p);
}

void launch_x(const BackwardCall& call, const BackwardPlan& plan, const BackwardScratch& scratch) {
    OuterParams p{};
    p.wide = call.x;
    p.wide_stride = call.x_stride;
    p.narrow = scratch.dz;
    p.a = weight_a(call);
    p.dx = call.dx;
    p.partial = call.da ? scratch.da : nullptr;
    p.adds = call.first_row > 0;
    p.m = call.shape.m;
    p.rows_per_chunk = plan.da_rows;
    p.w = call.shape.k;
    p.stages = plan.x.stages;
    p.dropout = dropout_of(call);
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
    part.dy = at(call.dy, first * call.dy_stride);
    part.z = at(call.z, first * call.shape.r);
    part.dx = const_cast<void*>(at(call.dx, first * call.shape.k));
    return part;
}

// One round. Sums over rows are added to those of the rounds before it, and written by the last
// one.
void backward_round(const BackwardCall& call, const ForwardPlan& forward, const BackwardPlan& plan,
                    const Packed& packed, const BackwardScratch& scratch, bool last) {
    const void* z = call.z ? call.z : scratch.z;
    if (!call.z)
        recompute_z(call, packed, forward, scratch.dh, scratch.z);

    const bool need_dz = call.dx || call.da, two_passes = !plan.one_pass_dy;
    launch_dy_passes(call, plan, packed, z, scratch, need_dz);
    ReduceParams first{};
    if (need_dz || (two_passes && call.db)) {
        SumRowsJob& rows = first.rows;
        rows.partial = need_dz ? scratch.dh : nullptr;
        rows.count = plan.dh_parts;
        rows.z = z;
        rows.dz = need_dz ? scratch.dz : nullptr;
        rows.h = two_passes && call.db ? scratch.h : nullptr;
        rows.alpha_t = call.alpha_t;
        rows.m = call.shape.m;
        rows.r = call.shape.r;
        rows.rank_class = plan.rank;
        rows.activation = call.activation;
        rows.scale = call.scaling * inverse_keep(call.threshold);
    }
    if (call.db && !two_passes && last)
        first.db = db_job(call, plan, scratch);
    launch_reduce_jobs(call, first);

    ReduceParams second{};
    if (call.db && two_passes)
        launch_db(call, plan, scratch);
    if (need_dz)
        launch_x(call, plan, scratch);
    if (call.db && two_passes && last)
        second.db = db_job(call, plan, scratch);
    if (call.da && last)
        second.da = da_job(call, plan, scratch);
    launch_reduce_jobs(call, second);
}

}  // namespace

const RankKernels& rank_kernels(DType dtype, int rank) {
    switch (rank) {
    case 16:
        return rank16_kernels(dtype);
    case 32:
        return rank32_kernels(dtype);
    case 64:
        return rank64_kernels(dtype);
    default:
        return rank128_kernels(dtype);
    }
}

int64_t forward_workspace(const Shape& shape) {
    Workspace count(nullptr);
    ForwardScratch scratch(shape, plan_forward(shape, kAnyDevice), count);
    return count.used();
}

int64_t backward_workspace(const Shape& shape, bool recompute_z) {
    Workspace count(nullptr);
    BackwardScratch scratch(shape, plan_forward(shape, kAnyDevice),
                            plan_backward(shape, kAnyDevice), recompute_z, count);
    return count.used();
}

void forward(const ForwardCall& call) {
    const ForwardPlan plan = plan_forward(call.shape, call.device);
    check_call(call);
    check_matrix("y", call.y, call.y_stride, call.shape);
    check_matrix("base", call.base, call.base_stride, call.shape);
    check_z(call.z, call.shape);
    Workspace workspace(call.workspace);
    const ForwardScratch scratch(call.shape, plan, workspace);
    const Packed packed = pack_operands(call, plan.rank, true, true, scratch.a, scratch.b);
    const RankKernels& kernels = rank_kernels(call.dtype, plan.rank);

    ForwardParams p{};
    p.project = project_x(call, packed, plan, scratch.partial);
    p.b = packed.b;
    p.b_stride = packed.b_stride;
    p.base = call.base;
    p.base_stride = call.base_stride;
    p.y = call.y;
    p.y_stride = call.y_stride;
    p.z = call.z;
    p.alpha_t = call.alpha_t;
    p.n = call.shape.n;
    p.r = call.shape.r;
    p.column_blocks = plan.expand.grid_y;
    p.activation = call.activation;
    p.scaling = call.scaling;
    p.inverse_keep = inverse_keep(call.threshold);
    if (plan.one_pass) {
        p.project.stages = plan.forward.stages;
        kernels.forward(config_of(plan.forward, call), p);
    } else {
        kernels.project(config_of(plan.project, call), p.project);
        p.project.stages = plan.expand.stages;
        kernels.expand(config_of(plan.expand, call), p);
    }
}

void backward(const BackwardCall& call) {
    const ForwardPlan forward = plan_forward(call.shape, call.device);
    const BackwardPlan plan = plan_backward(call.shape, call.device);
    check_call(call);
    check_matrix("dy", call.dy, call.dy_stride, call.shape);
    check_matrix("dx", call.dx, call.shape.k, call.shape);
    check_z(call.z, call.shape);
    Workspace workspace(call.workspace);
    const BackwardScratch scratch(call.shape, forward, plan, !call.z, workspace);
    const bool streams_b = !plan.one_pass_dy && (call.dx || call.da);
    const Packed packed = pack_operands(call, plan.rank, !call.z, streams_b, scratch.a, scratch.b);
    for (int64_t first = 0; first < call.shape.m; first += plan.rows) {
        const bool last = first + plan.rows >= call.shape.m;
        backward_round(rows_of(call, first, std::min(plan.rows, call.shape.m - first)), forward,
                       plan, packed, scratch, last);
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
        kernels.push_back(backward.dy);
    else
        kernels.insert(kernels.end(), {backward.project_dy, backward.db});
    kernels.push_back(backward.x);
    return kernels;
}

}  // namespace afa
