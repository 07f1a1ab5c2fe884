// What the kernels are told of a call.
#pragma once

#include <algorithm>

#include "cuda/operands.h"

namespace afa {

inline DropoutParams dropout_of(const BranchCall& call) {
    return {call.seed, call.threshold, call.first_row};
}

// x A^T.
inline ProjectParams project_x(const BranchCall& call, const ForwardPlan& plan,
                               const KernelPlan& kernel, float* partial) {
    ProjectParams p{};
    p.wide = call.x;
    p.wide_stride = call.x_stride;
    fill_rank_rows(p.narrow, call);
    p.rounded = weights_of(call) == Weights::rounded;
    p.staged = kernel.staged;
    p.partial = partial;
    p.m = p.partial_rows = call.shape.m;
    p.w = call.shape.k;
    p.segment = plan.segment;
    p.splits = plan.splits;
    p.stages = kernel.stages;
    p.dropout = dropout_of(call);
    return p;
}

// dh = dy B of a lone layer.
inline ProjectParams project_dy(const BackwardCall& call, const KernelPlan& kernel, int segment,
                                int splits, float* dh) {
    ProjectParams p{};
    p.wide = call.gradients[0].dy;
    p.wide_stride = call.gradients[0].dy_stride;
    p.narrow[0] = weight_b(call, 0);
    p.narrow_transposed = true;
    p.rounded = weights_of(call) == Weights::rounded;
    p.staged = kernel.staged;
    p.partial = dh;
    p.m = p.partial_rows = call.shape.m;
    p.w = call.shape.members[0].n;
    p.segment = segment;
    p.splits = splits;
    p.stages = kernel.stages;
    return p;
}

// y and z of member i; its place among the members is not filled in.
inline ForwardMember forward_member(const BranchCall& call, int i, const MemberOutput& out) {
    ForwardMember member{};
    member.b = weight_b(call, i);
    member.base = out.base;
    member.base_stride = out.base_stride;
    member.y = out.y;
    member.y_stride = out.y_stride;
    member.z = out.z;
    member.z_cols = call.shape.members[i].r;
    member.alpha_t = call.members[i].alpha_t;
    member.activation = call.members[i].activation;
    member.scaling = call.members[i].scaling;
    return member;
}

// What the dy kernel reads of member i.
inline DyMember dy_member(const BackwardCall& call, int i) {
    DyMember member{};
    member.dy = call.gradients[i].dy;
    member.dy_stride = call.gradients[i].dy_stride;
    member.b = weight_b(call, i);
    member.z = call.gradients[i].z;
    member.z_cols = call.shape.members[i].r;
    member.alpha_t = call.members[i].alpha_t;
    member.activation = call.members[i].activation;
    member.scaling = call.members[i].scaling;
    return member;
}

// Where dB of member i goes, and the rows of every dA, side by side as those of A are.
inline WeightGradient db_result(const BackwardCall& call, int i) {
    const MemberGradients& member = call.gradients[i];
    return {member.db, call.shape.members[i].n, member.db_is_float ? Output::fp32 : Output::t};
}
inline void fill_da(WeightGradient (&blocks)[kMaxRank / kRankUnit], const BackwardCall& call) {
    int block = 0;
    for (int i = 0; i < call.shape.count; ++i) {
        const MemberGradients& member = call.gradients[i];
        const int64_t bytes = static_cast<int64_t>(kRankUnit) * call.shape.k *
                              (member.da_is_float ? kFloatBytes : kElementBytes);
        WeightGradient rows{member.da, 0, member.da_is_float ? Output::fp32 : Output::t};
        for (int left = call.shape.members[i].r; left > 0; left -= kRankUnit, ++block) {
            rows.rows = member.da ? std::min(left, kRankUnit) : 0;
            blocks[block] = rows;
            if (member.da)
                rows.out = static_cast<char*>(rows.out) + bytes;
        }
    }
}

// dB = dy^T h of a lone layer; where it goes is not filled in.
inline OuterPass outer_dy(const BackwardCall& call, const KernelPlan& kernel,
                          int64_t rows_per_chunk, const void* h) {
    OuterPass p{};
    p.wide = call.gradients[0].dy;
    p.wide_stride = call.gradients[0].dy_stride;
    p.narrow = h;
    p.m = call.shape.m;
    p.rows_per_chunk = rows_per_chunk;
    p.w = call.shape.members[0].n;
    p.stages = kernel.stages;
    return p;
}

// dx, and dA = dz^T x, whose place is not filled in.
inline OuterParams outer_x(const BackwardCall& call, const KernelPlan& kernel,
                           int64_t rows_per_chunk, const void* dz) {
    OuterParams p{};
    p.wide = call.x;
    p.wide_stride = call.x_stride;
    p.narrow = dz;
    fill_rank_rows(p.a, call);
    p.rounded = any_a_rounded(call);
    p.dx = call.dx;
    p.m = call.shape.m;
    p.rows_per_chunk = rows_per_chunk;
    p.w = call.shape.k;
    p.stages = kernel.stages;
    p.dropout = dropout_of(call);
    return p;
}

}  // namespace afa
