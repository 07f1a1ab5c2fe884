// The global memory that each kernel may touch, to the byte, derived from its parameters.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/params.h"
#include "cuda/prim_check.cuh"
#include "emulator/simt.h"

namespace afa {

constexpr size_t kElement = 2;  // bytes of T

class BufferList {
  public:
    std::vector<simt::Buffer> list;

    // T [rows, cols] with a row stride.
    void matrix(const char* name, const void* data, int64_t rows, int64_t cols, int64_t stride,
                bool writable = false) {
        add(name, data, static_cast<size_t>((rows - 1) * stride + cols) * kElement, writable);
    }
    void weight(const char* name, const Weight& w) {
        if (w.rows == 0)
            return;
        const int64_t last = (w.rows - 1) * w.row_stride + (w.cols - 1) * w.col_stride;
        const size_t size = w.is_float ? sizeof(float) : kElement;
        add(name, w.data, static_cast<size_t>(last + 1) * size, false);
    }
    // The rows of A of a kernel of rank class R.
    void rank_rows(const Weight (&a)[kMaxRank / kRankUnit], int rank_class) {
        for (int i = 0; i < rank_class / kRankUnit; ++i)
            weight("a", a[i]);
    }
    void floats(const char* name, const float* data, int64_t count, bool writable = false) {
        add(name, data, static_cast<size_t>(count) * sizeof(float), writable);
    }
    // As many columns as it has, which is not said there.
    void gradient(const char* name, const WeightGradient& g, int64_t cols) {
        const size_t size = g.type == Output::fp32 ? sizeof(float) : kElement;
        if (g.rows > 0)
            add(name, g.out, static_cast<size_t>(g.rows * cols) * size, true);
    }
    void seed(const DropoutParams& dropout) {
        if (dropout.threshold > 0)
            add("seed", dropout.seed, sizeof(int64_t), false);
    }
    // What a pass over x or dy sums over rows.
    template <int R>
    void outer(const OuterPass& p, const SlabSums& sums) {
        using Tile = OuterTile<R>;
        const int64_t chunks = (p.m + p.rows_per_chunk - 1) / p.rows_per_chunk;
        const int64_t slabs = (p.w + Tile::kColumns - 1) / Tile::kColumns;
        matrix("wide", p.wide, p.m, p.w, p.wide_stride);
        matrix("narrow", p.narrow, p.m, R, R);
        floats("partial", p.partial, std::max<int64_t>(chunks, sums.count) * R * p.w, true);
        if (sums.count > 1)
            add("arrived", sums.arrived, slabs * Tile::kThreads * sizeof(uint32_t), true);
    }
    // What a job on rows reads and writes, its partial sums aside.
    void rows_job(const SumRowsJob& job) {
        matrix("z_out", job.z_out, job.m, job.r, job.r, true);
        matrix("z", job.z, job.m, job.r, job.r);
        matrix("dz", job.dz, job.m, job.cols, job.rank_class, true);
        matrix("h", job.h, job.m, job.cols, job.rank_class, true);
        floats("alpha_t", job.alpha_t, 1);
    }
    void add(const char* name, const void* data, size_t bytes, bool writable) {
        if (data)
            list.push_back({name, data, bytes, writable});
    }
};

template <int R>
std::vector<simt::Buffer> emulated_buffers(const ForwardParams& p) {
    BufferList b;
    const ProjectParams& q = p.project;
    b.matrix("x", q.wide, q.m, q.w, q.wide_stride);
    b.rank_rows(q.narrow, R);
    b.floats("partial", q.partial, q.splits * q.m * R);
    b.seed(q.dropout);
    for (int i = 0; i < p.count; ++i) {
        const ForwardMember& member = p.members[i];
        const int n = member.b.rows, r = member.b.cols;
        b.weight("b", member.b);
        b.matrix("y", member.y, q.m, n, member.y_stride, true);
        b.matrix("base", member.base, q.m, n, member.base_stride);
        b.matrix("z", member.z, q.m, r, r, true);
        b.floats("alpha_t", member.alpha_t, 1);
    }
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const ProjectParams& p) {
    BufferList b;
    b.matrix("wide", p.wide, p.m, p.w, p.wide_stride);
    b.rank_rows(p.narrow, R);
    b.floats("partial", p.partial, p.splits * p.m * R, true);
    b.seed(p.dropout);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const DyParams& p) {
    const int64_t chunks = (p.m + p.rows_per_chunk - 1) / p.rows_per_chunk;
    BufferList b;
    for (const DyMember& member : p.members) {
        if (!member.dh && !member.db)
            continue;
        const int64_t n = member.b.rows, r = member.b.cols, slabs = (n + kSlab - 1) / kSlab;
        b.matrix("dy", member.dy, p.m, n, member.dy_stride);
        b.weight("b", member.b);
        b.matrix("z", member.z, p.m, r, r);
        b.floats("alpha_t", member.alpha_t, 1);
        b.floats("dh", member.dh, slabs * p.m * R, true);
        b.floats("db", member.db, chunks * n * R, true);
        b.gradient("dB", member.result, r);
    }
    b.add("arrived", p.arrived, static_cast<size_t>(p.arrived_count) * sizeof(uint32_t), true);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const ProjectDyParams& p) {
    BufferList b;
    b.matrix("dy", p.project.wide, p.project.m, p.project.w, p.project.wide_stride);
    b.weight("b", p.project.narrow[0]);
    if (p.project.splits > 1)
        b.floats("partial", p.project.partial, p.project.splits * p.project.m * R, true);
    else
        b.rows_job(p.rows);
    b.add("arrived", p.arrived, static_cast<size_t>(p.arrived_count) * sizeof(uint32_t), true);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const OuterParams& p) {
    BufferList b;
    b.outer<R>(p, p.sums);
    b.floats("dh", p.dz.partial, p.dz.count * p.m * R);
    b.matrix("z", p.dz.z, p.m, p.dz.r, p.dz.r);
    b.floats("alpha_t", p.dz.alpha_t, 1);
    b.rank_rows(p.a, R);
    b.matrix("dx", p.dx, p.m, p.w, p.w, true);
    for (const WeightGradient& rows : p.da)
        b.gradient("dA", rows, p.w);
    b.seed(p.dropout);
    if (p.db.columns > 0) {
        b.outer<R>(p.db, p.db.sums);
        b.gradient("dB", p.db.result, p.db.r);
    }
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const ReduceParams& p) {
    BufferList b;
    for (const SumRowsJob& job : p.rows)
        if (job.first != kNoMember) {
            b.floats("rows.partial", job.partial, job.count * job.m * job.partial_stride);
            b.rows_job(job);
        }
    for (const SumWeightJob& job : p.weights) {
        if (job.first == kNoMember)
            continue;
        b.floats("weight.partial", job.partial, job.count * job.rows_stride);
        const size_t size = job.type == Output::fp32 ? sizeof(float) : kElement;
        b.add("weight.out", job.out, static_cast<size_t>(job.rows * job.cols) * size, true);
    }
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const PrimitiveCheckParams& p) {
    BufferList b;
    b.add("in", p.in, 512 * kElement, false);
    b.floats("values", p.values, 128);
    b.add("out", p.out, kPrimitiveCheckWords * sizeof(uint32_t), true);
    return b.list;
}

}  // namespace afa
