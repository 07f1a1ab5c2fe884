// What the kernels are told of a call.
#pragma once

#include <algorithm>

#include "cuda/host/ops.h"

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
    p.narrow = call.weights.a;
    p.partial = partial;
    p.m = call.shape.m;
    p.w = call.shape.k;
    p.segment = plan.segment;
    p.splits = plan.splits;
    p.stages = kernel.stages;
    p.dropout = dropout_of(call);
    return p;
}

// dh = dy B of a lone layer.
inline ProjectParams project_dy(const BackwardCall& call, const BackwardPlan& plan, float* dh) {
    ProjectParams p{};
    p.wide = call.gradients[0].dy;
    p.wide_stride = call.gradients[0].dy_stride;
    p.narrow = call.weights.b[0];
    p.partial = dh;
    p.m = call.shape.m;
    p.w = call.shape.members[0].n;
    p.segment = plan.segment;
    p.splits = plan.dh_parts[0];
    p.stages = plan.project_dy.stages;
    return p;
}

// y and z of member i; its place among the members is not filled in.
inline ForwardMember forward_member(const BranchCall& call, int i, const MemberOutput& out) {
    ForwardMember member{};
    member.b = call.weights.b[i];
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
    member.b = call.weights.b[i];
    member.z = call.gradients[i].z;
    member.z_cols = call.shape.members[i].r;
    member.alpha_t = call.members[i].alpha_t;
    member.activation = call.members[i].activation;
    member.scaling = call.members[i].scaling;
    return member;
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
    p.a = call.weights.a;
    p.dx = call.dx;
    p.m = call.shape.m;
    p.rows_per_chunk = rows_per_chunk;
    p.w = call.shape.k;
    p.stages = kernel.stages;
    p.dropout = dropout_of(call);
    return p;
}

}  // namespace afa
