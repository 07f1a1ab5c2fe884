// The global memory that each ragged kernel may touch, derived from its parameters.
#pragma once

#include <algorithm>

#include "cuda/ragged_params.h"
#include "emulator/buffers.h"

namespace afa {

class RaggedBufferList : public BufferList {
  public:
    explicit RaggedBufferList(const Groups& groups) : groups_(groups) {
        of_groups("ends", groups.ends, groups.ends_stride);
        of_groups("ranks", groups.ranks, groups.ranks_stride);
        of_groups("scaling", groups.scaling, groups.scaling_stride);
    }
    // One value of four bytes for each group.
    void of_groups(const char* name, const void* data, int64_t stride) {
        add(name, data, static_cast<size_t>((groups_.count - 1) * stride + 1) * 4, false);
    }
    // The weights of all groups, of which `first` is the first one, or some of its rows.
    void weights(const char* name, const Weight& first, int rows, int64_t stride) {
        const int64_t last = (groups_.count - 1) * stride + (rows - 1) * first.row_stride +
                             (first.cols - 1) * first.col_stride;
        const size_t size = first.is_float ? sizeof(float) : kElement;
        add(name, first.data, static_cast<size_t>(last + 1) * size, false);
    }
    void sums(const GroupSums& sums, int rank_class) {
        const size_t size = sums.type == Output::fp32 ? sizeof(float) : kElement;
        const int64_t elements = static_cast<int64_t>(groups_.count) * groups_.r * sums.w;
        add("out", sums.out, static_cast<size_t>(elements) * size, true);
        const int64_t partials = 2 * ((groups_.rows + groups_.chunk_rows - 1) / groups_.chunk_rows);
        floats("partial", sums.partial, partials * rank_class * sums.columns, true);
    }

  private:
    const Groups& groups_;
};

template <int R>
std::vector<simt::Buffer> emulated_buffers(const RaggedForwardParams& p) {
    RaggedBufferList b(p.groups);
    const ProjectParams& q = p.call.project;
    const ForwardMember& member = p.call.members[0];
    b.matrix("x", q.wide, q.m, q.w, q.wide_stride);
    b.weights("a", q.narrow[0], p.groups.r, p.groups.a_stride);
    b.floats("partial", q.partial, q.splits * q.m * R);
    b.seed(q.dropout);
    b.weights("b", member.b, member.b.rows, p.groups.b_stride);
    b.matrix("y", member.y, q.m, member.b.rows, member.y_stride, true);
    b.matrix("base", member.base, q.m, member.b.rows, member.base_stride);
    b.matrix("z", member.z, q.m, member.z_cols, member.z_cols, true);
    b.of_groups("alpha_t", member.alpha_t, p.groups.alpha_stride);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const RaggedProjectParams& p) {
    RaggedBufferList b(p.groups);
    const ProjectParams& q = p.call;
    const bool transposed = q.narrow_transposed;
    b.matrix("wide", q.wide, q.m, q.w, q.wide_stride);
    b.weights(transposed ? "b" : "a", q.narrow[0], transposed ? q.narrow[0].rows : p.groups.r,
              transposed ? p.groups.b_stride : p.groups.a_stride);
    b.floats("partial", q.partial, q.splits * q.m * R, true);
    b.seed(q.dropout);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const RaggedRowsParams& p) {
    RaggedBufferList b(p.groups);
    const SumRowsJob& job = p.job;
    const int count = std::max(job.count, p.low_rank_count);
    b.floats("partial", job.partial, count * job.m * job.partial_stride);
    if (job.z != job.h)
        b.matrix("z", job.z, job.m, job.r, job.r);
    b.matrix("dz", job.dz, job.m, job.cols, job.rank_class, true);
    b.matrix("h", job.h, job.m, job.cols, job.rank_class, true);
    b.of_groups("alpha_t", job.alpha_t, p.groups.alpha_stride);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const RaggedDyParams& p) {
    RaggedBufferList b(p.groups);
    const DyMember& member = p.call.members[0];
    const int64_t slabs = (member.b.rows + kSlab - 1) / kSlab;
    b.matrix("dy", member.dy, p.call.m, member.b.rows, member.dy_stride);
    b.weights("b", member.b, member.b.rows, p.groups.b_stride);
    b.matrix("z", member.z, p.call.m, member.z_cols, member.z_cols);
    b.of_groups("alpha_t", member.alpha_t, p.groups.alpha_stride);
    b.floats("dh", member.dh, slabs * p.call.m * R, true);
    b.sums(p.sums, R);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const RaggedOuterParams& p) {
    RaggedBufferList b(p.groups);
    const OuterParams& q = p.call;
    b.matrix("wide", q.wide, q.m, q.w, q.wide_stride);
    b.matrix("narrow", q.narrow, q.m, R, R);
    if (q.dx)
        b.weights("a", q.a[0], p.groups.r, p.groups.a_stride);
    b.matrix("dx", q.dx, q.m, q.w, q.w, true);
    b.seed(q.dropout);
    b.sums(p.sums, R);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const RaggedSumParams& p) {
    RaggedBufferList b(p.groups);
    for (const GroupSums* sums : {&p.da, &p.db})
        b.sums(*sums, p.rank_class);
    return b.list;
}

}  // namespace afa
