// The global memory that each kernel may touch, to the byte, derived from its parameters.
#pragma once

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
        const int64_t last = (w.rows - 1) * w.row_stride + (w.cols - 1) * w.col_stride;
        const size_t size = w.is_float ? sizeof(float) : kElement;
        add(name, w.data, static_cast<size_t>(last + 1) * size, false);
    }
    void floats(const char* name, const float* data, int64_t count, bool writable = false) {
        add(name, data, static_cast<size_t>(count) * sizeof(float), writable);
    }
    void seed(const DropoutParams& dropout) {
        if (dropout.threshold > 0)
            add("seed", dropout.seed, sizeof(int64_t), false);
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
    b.matrix("a", q.narrow, R, q.w, q.narrow_stride);
    b.floats("partial", q.partial, q.splits * q.m * R);
    b.seed(q.dropout);
    b.matrix("b", p.b, p.n, R, p.b_stride);
    b.matrix("y", p.y, q.m, p.n, p.y_stride, true);
    b.matrix("base", p.base, q.m, p.n, p.base_stride);
    b.matrix("z", p.z, q.m, p.r, p.r, true);
    b.floats("alpha_t", p.alpha_t, 1);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const ProjectParams& p) {
    const bool transposed = p.narrow_transposed;
    BufferList b;
    b.matrix("wide", p.wide, p.m, p.w, p.wide_stride);
    b.matrix("narrow", p.narrow, transposed ? p.w : R, transposed ? R : p.w, p.narrow_stride);
    b.floats("partial", p.partial, p.splits * p.m * R, true);
    b.seed(p.dropout);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const DyParams& p) {
    const int64_t slabs = (p.n + 255) / 256,
                  chunks = (p.m + p.rows_per_chunk - 1) / p.rows_per_chunk;
    BufferList b;
    b.matrix("dy", p.dy, p.m, p.n, p.dy_stride);
    b.weight("b", p.b);
    b.matrix("z", p.z, p.m, p.r, p.r);
    b.floats("alpha_t", p.alpha_t, 1);
    b.floats("dh", p.dh, slabs * p.m * R, true);
    b.floats("db", p.db, chunks * p.n * R, true);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const OuterParams& p) {
    const int64_t chunks = (p.m + p.rows_per_chunk - 1) / p.rows_per_chunk;
    BufferList b;
    b.matrix("wide", p.wide, p.m, p.w, p.wide_stride);
    b.matrix("narrow", p.narrow, p.m, R, R);
    b.weight("a", p.a);
    b.matrix("dx", p.dx, p.m, p.w, p.w, true);
    b.floats("partial", p.partial, chunks * R * p.w, true);
    b.seed(p.dropout);
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const ReduceParams& p) {
    BufferList b;
    const SumRowsJob& rows = p.rows;
    if (rows.m > 0) {
        b.floats("rows.partial", rows.partial, rows.count * rows.m * rows.rank_class);
        b.matrix("z_out", rows.z_out, rows.m, rows.r, rows.r, true);
        b.matrix("z", rows.z, rows.m, rows.r, rows.r);
        b.matrix("dz", rows.dz, rows.m, rows.rank_class, rows.rank_class, true);
        b.matrix("h", rows.h, rows.m, rows.rank_class, rows.rank_class, true);
        b.floats("alpha_t", rows.alpha_t, 1);
    }
    for (const SumWeightJob& job : {p.db, p.da}) {
        if (!job.partial)
            continue;
        b.floats("weight.partial", job.partial, job.count * job.rows_stride);
        const size_t size = job.type == Output::fp32 ? sizeof(float) : kElement;
        b.add("weight.out", job.out, static_cast<size_t>(job.rows * job.cols) * size, true);
    }
    return b.list;
}

template <int R>
std::vector<simt::Buffer> emulated_buffers(const PackParams& p) {
    BufferList b;
    for (const PackJob& job : {p.a, p.b}) {
        if (!job.source.data)
            continue;
        b.weight("source", job.source);
        b.matrix("target", job.target, job.padded_rows, job.padded_cols, job.padded_cols, true);
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
