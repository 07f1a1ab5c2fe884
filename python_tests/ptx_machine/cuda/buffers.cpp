// The memory that each kernel may touch, to the byte, from its mangled name and its argument.
#include <stdexcept>

#include "cuda/kernels/params.h"
#include "ptx_machine/cuda/runtime.h"

namespace ptx {
namespace {

using namespace afa;

constexpr size_t kElement = 2;  // bytes of T

class BufferList {
  public:
    std::vector<Allocation> list;

    // T [rows, cols] with a row stride.
    void matrix(const char* name, const void* data, int64_t rows, int64_t cols, int64_t stride,
                bool writable = false) {
        add(name, data, static_cast<size_t>((rows - 1) * stride + cols) * kElement, writable);
    }
    void weight(const char* name, const Weight& w) {
        matrix(name, w.data, w.rows, w.cols, w.row_stride);
    }
    void packs(const PackJob& job) {
        if (job.first == kNoMember)
            return;
        const int64_t last = (job.rows - 1) * job.row_stride + (job.cols - 1) * job.col_stride;
        const size_t size = job.is_float ? sizeof(float) : kElement;
        add("weight", job.data, static_cast<size_t>(last + 1) * size, false);
        matrix("packed", job.out, job.out_rows, job.out_cols, job.out_cols, true);
    }
    void floats(const char* name, const float* data, int64_t count, bool writable = false) {
        add(name, data, static_cast<size_t>(count) * sizeof(float), writable);
    }
    void seed(const DropoutParams& dropout) {
        if (dropout.threshold > 0)
            add("seed", dropout.seed, sizeof(int64_t), false);
    }
    // What a pass over x or dy sums over rows.
    template <int R>
    void outer(const OuterPass& p) {
        const int64_t chunks = (p.m + p.rows_per_chunk - 1) / p.rows_per_chunk;
        matrix("wide", p.wide, p.m, p.w, p.wide_stride);
        matrix("narrow", p.narrow, p.m, R, R);
        floats("partial", p.partial, chunks * R * p.w, true);
    }
    // What a job on rows reads and writes, its partial sums aside.
    void rows_job(const SumRowsJob& job) {
        matrix("z", job.z, job.m, job.r, job.r);
        matrix("dz", job.dz, job.m, job.cols, job.rank_class, true);
        matrix("h", job.h, job.m, job.cols, job.rank_class, true);
        floats("alpha_t", job.alpha_t, 1);
    }
    void add(const char* name, const void* data, size_t bytes, bool writable) {
        if (data)
            list.push_back({reinterpret_cast<uint64_t>(data), bytes, writable, name});
    }
};

template <int R>
std::vector<Allocation> buffers(const ForwardParams& p) {
    BufferList b;
    const ProjectParams& q = p.project;
    b.matrix("x", q.wide, q.m, q.w, q.wide_stride);
    b.weight("a", q.narrow);
    b.floats("partial", q.partial, q.splits * q.m * R);
    b.seed(q.dropout);
    for (int i = 0; i < p.count; ++i) {
        const ForwardMember& member = p.members[i];
        const int n = member.b.rows, r = member.z_cols;
        b.weight("b", member.b);
        b.matrix("y", member.y, q.m, n, member.y_stride, true);
        b.matrix("base", member.base, q.m, n, member.base_stride);
        b.matrix("z", member.z, q.m, r, r, true);
        b.floats("alpha_t", member.alpha_t, 1);
    }
    return b.list;
}

template <int R>
std::vector<Allocation> buffers(const ProjectParams& p) {
    BufferList b;
    b.matrix("wide", p.wide, p.m, p.w, p.wide_stride);
    b.weight("narrow", p.narrow);
    b.floats("partial", p.partial, p.splits * p.m * R, true);
    b.seed(p.dropout);
    return b.list;
}

template <int R>
std::vector<Allocation> buffers(const DyParams& p) {
    const int64_t chunks = (p.m + p.rows_per_chunk - 1) / p.rows_per_chunk;
    BufferList b;
    for (const DyMember& member : p.members) {
        if (!member.dh && !member.db)
            continue;
        const int64_t n = member.b.rows, r = member.z_cols, slabs = (n + kSlab - 1) / kSlab;
        b.matrix("dy", member.dy, p.m, n, member.dy_stride);
        b.weight("b", member.b);
        b.matrix("z", member.z, p.m, r, r);
        b.floats("alpha_t", member.alpha_t, 1);
        b.floats("dh", member.dh, slabs * p.m * R, true);
        b.floats("db", member.db, chunks * n * R, true);
    }
    return b.list;
}

template <int R>
std::vector<Allocation> buffers(const OuterPass& p) {
    BufferList b;
    b.outer<R>(p);
    return b.list;
}

template <int R>
std::vector<Allocation> buffers(const OuterParams& p) {
    BufferList b;
    b.outer<R>(p);
    b.weight("a", p.a);
    b.matrix("dx", p.dx, p.m, p.w, p.w, true);
    b.seed(p.dropout);
    return b.list;
}

template <int R>
std::vector<Allocation> buffers(const PackParams& p) {
    BufferList b;
    for (const PackJob& job : p.a)
        b.packs(job);
    for (const PackJob& job : p.b)
        b.packs(job);
    return b.list;
}

template <int R>
std::vector<Allocation> buffers(const ReduceParams& p) {
    BufferList b;
    for (const SumRowsJob& job : p.rows)
        if (job.first != kNoMember) {
            b.floats("rows.partial", job.partial, job.count * job.m * job.partial_stride);
            b.rows_job(job);
        }
    for (const SumWeightJob& job : p.weights) {
        if (job.first == kNoMember)
            continue;
        const int64_t last = (job.count - 1) * job.rows_stride;
        b.floats("weight.partial", job.partial,
                 last + (job.rows - 1) * job.partial_cols + job.cols);
        const size_t size = job.type == Output::fp32 ? sizeof(float) : kElement;
        b.add("weight.out", job.out, static_cast<size_t>(job.rows * job.cols) * size, true);
    }
    return b.list;
}

template <int R>
std::vector<Allocation> buffers(const PrimitiveCheckParams& p) {
    BufferList b;
    b.add("in", p.in, 512 * kElement, false);
    b.floats("values", p.values, 128);
    b.add("out", p.out, kPrimitiveCheckWords * sizeof(uint32_t), true);
    return b.list;
}

template <typename Params, int R>
std::vector<Allocation> buffers_at(const void* parameters) {
    return buffers<R>(*static_cast<const Params*>(parameters));
}

template <typename Params>
std::vector<Allocation> of_rank(int rank, const void* parameters) {
    switch (rank) {
    case 16:
        return buffers_at<Params, 16>(parameters);
    case 32:
        return buffers_at<Params, 32>(parameters);
    case 64:
        return buffers_at<Params, 64>(parameters);
    }
    throw std::runtime_error("no kernel has rank class " + std::to_string(rank));
}

}  // namespace

std::vector<Allocation> buffers_of(const std::string& name, const void* parameters) {
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    const size_t mark = name.find("ELi");  // the template argument R
    const int rank = mark == std::string::npos ? 0 : std::stoi(name.substr(mark + 3));
    if (has("14forward_kernelI") || has("13expand_kernelI"))
        return of_rank<ForwardParams>(rank, parameters);
    if (has("14project_kernelI") || has("17project_dy_kernelI"))
        return of_rank<ProjectParams>(rank, parameters);
    if (has("9db_kernelI"))
        return of_rank<OuterPass>(rank, parameters);
    if (has("8x_kernelI"))
        return of_rank<OuterParams>(rank, parameters);
    if (has("9dy_kernelI"))
        return of_rank<DyParams>(rank, parameters);
    if (has("11pack_kernelI"))
        return buffers_at<PackParams, 0>(parameters);
    if (has("13reduce_kernelI"))
        return buffers_at<ReduceParams, 0>(parameters);
    if (has("22primitive_check_kernelI"))
        return buffers_at<PrimitiveCheckParams, 0>(parameters);
    throw std::runtime_error("the buffers of kernel " + name + " are not known");
}

}  // namespace ptx
