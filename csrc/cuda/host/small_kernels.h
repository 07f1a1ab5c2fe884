// The jobs of the kernels without a rank class: A and B as the other kernels read them, and what is
// made of partial sums.
#pragma once

#include "cuda/host/check_call.h"
#include "cuda/host/scratch.h"
#include "cuda/kernels/tiles.h"

namespace afa {

inline float inverse_keep(int threshold) { return 256.0f / static_cast<float>(256 - threshold); }

// Jobs of one kind in a launch, one behind the other.
template <typename Job>
class Jobs {
  public:
    explicit Jobs(Job (&jobs)[kMaxMembers]) : jobs_(jobs) {
        for (Job& job : jobs_)
            job.first = kNoMember;
    }
    void add(Job job, int64_t threads) {
        job.first = blocks_;
        blocks_ += static_cast<int>((threads + kSmallThreads - 1) / kSmallThreads);
        jobs_[count_++] = job;
    }
    int blocks() const { return blocks_; }

  private:
    Job (&jobs_)[kMaxMembers];
    int count_ = 0, blocks_ = 0;
};

inline LaunchConfig small_config(const BranchCall& call, const char* kernel, int64_t blocks) {
    LaunchConfig config{{}, call.shape, call.stream};
    config.plan.kernel = kernel;
    config.plan.grid_x = blocks;
    config.plan.threads = kSmallThreads;
    return config;
}

// Whether the rows of a weight with `cols` columns are whole vectors that start at 16 bytes.
inline bool is_in_vectors(const WeightOperand& w, int cols) {
    const int vector = w.is_float ? kVector / 2 : kVector;  // elements in 16 bytes
    return w.col_stride == 1 && w.row_stride % vector == 0 && cols % kVector == 0 &&
           aligned(w.data);
}

// Whether the kernels can read A and B of a call where they lie: those of a lone layer, in T.
inline bool reads_in_place(const BranchCall& call) {
    const MemberOperands& member = call.members[0];
    const auto in_place = [](const WeightOperand& w, int cols) {
        return !w.is_float && is_in_vectors(w, cols);
    };
    return call.shape.count == 1 && in_place(member.a, call.shape.k) &&
           in_place(member.b, call.shape.members[0].r);
}

// A and B of a call, or of all members side by side, as the kernels read them: where they lie, or
// packed in scratch memory, for which one kernel is launched.
inline KernelWeights ready_weights(const BranchCall& call, const PackedWeights& packed) {
    const Shape& shape = call.shape;
    const int k = shape.k;
    KernelWeights ready{};
    if (reads_in_place(call)) {
        const auto [n, r] = shape.members[0];
        const MemberOperands& member = call.members[0];
        ready.a = {member.a.data, member.a.row_stride, r, k};
        ready.b[0] = {member.b.data, member.b.row_stride, n, r};
        return ready;
    }
    const auto job_of = [](const WeightOperand& w, int rows, int cols, void* out, int out_rows,
                           int out_cols) {
        return PackJob{0,    w.data,   w.row_stride, w.col_stride,
                       rows, cols,     w.is_float,   is_in_vectors(w, cols),
                       out,  out_rows, out_cols};
    };
    const auto threads = [](const PackJob& job) {
        return static_cast<int64_t>(job.out_rows) * job.out_cols / kVector;
    };
    const int rank = rank_class(shape), largest = largest_rank_class(shape);
    PackParams p{};
    Jobs<PackJob> as(p.a), bs(p.b);
    for (int i = 0; i < shape.count; ++i) {
        const auto [n, r] = shape.members[i];
        Element* rows = packed.a + static_cast<int64_t>(shape.rank0(i)) * k;
        const PackJob a = job_of(call.members[i].a, r, k, rows, shape.own_columns(i, rank), k);
        const PackJob b = job_of(call.members[i].b, n, r, packed.b[i], n, largest);
        as.add(a, threads(a));
        bs.add(b, threads(b));
        ready.b[i] = {packed.b[i], largest, n, largest};
    }
    p.a_blocks = as.blocks();
    launch_pack(call.dtype, small_config(call, "pack", as.blocks() + bs.blocks()), p);
    ready.a = {packed.a, k, rank, k};
    return ready;
}

// Gathers the jobs of a launch of the reduce kernel.
class Reduction {
  public:
    void add(const SumRowsJob& job) { rows_.add(job, job.m * job.cols / 2); }
    void add(const SumWeightJob& job) { weights_.add(job, job.rows * job.cols); }
    void launch(const BranchCall& call) {
        const int64_t blocks = static_cast<int64_t>(rows_.blocks()) + weights_.blocks();
        params_.rows_blocks = rows_.blocks();
        if (blocks > 0)
            launch_reduce(call.dtype, small_config(call, "reduce", blocks), params_);
    }

  private:
    ReduceParams params_{};
    Jobs<SumRowsJob> rows_{params_.rows};
    Jobs<SumWeightJob> weights_{params_.weights};
};

// Whether dh of a member is needed.
inline bool needs_dz(const BackwardCall& call, int i) { return call.dx || call.gradients[i].da; }

// dz of a member, with the columns up to the next one's, or h, from the partial sums of dh.
inline SumRowsJob dz_job(const BackwardCall& call, const BackwardPlan& plan,
                         const BackwardScratch& scratch, int i) {
    const bool dz = needs_dz(call, i), h = !plan.one_pass_dy && call.gradients[i].db;
    const int rank0 = call.shape.rank0(i);
    SumRowsJob job{};
    job.partial = dz ? scratch.dh[i] : nullptr;
    job.count = plan.dh_parts[i];
    job.partial_stride = plan.dy_rank;
    job.z = call.gradients[i].z;
    job.dz = dz ? scratch.dz + rank0 : nullptr;
    job.h = h ? scratch.h : nullptr;
    job.alpha_t = call.members[i].alpha_t;
    job.m = call.shape.m;
    job.r = call.shape.members[i].r;
    job.cols = call.shape.own_columns(i, plan.rank);
    job.rank_class = plan.rank;
    job.activation = call.members[i].activation;
    job.scale = call.members[i].scaling * inverse_keep(call.threshold);
    return job;
}

inline SumWeightJob db_job(const BackwardCall& call, const BackwardPlan& plan,
                           const BackwardScratch& scratch, int i) {
    const MemberShape& s = call.shape.members[i];
    SumWeightJob job{};
    job.partial = scratch.db[i];
    job.out = call.gradients[i].db;
    job.type = call.gradients[i].db_is_float ? Output::fp32 : Output::t;
    job.count = plan.db_chunks;
    job.rows = s.n;
    job.rows_stride = static_cast<int64_t>(s.n) * plan.dy_rank;
    job.cols = s.r;
    job.partial_cols = plan.dy_rank;
    job.scale = call.members[i].scaling;
    return job;
}

inline SumWeightJob da_job(const BackwardCall& call, const BackwardPlan& plan,
                           const BackwardScratch& scratch, int i) {
    const int k = call.shape.k;
    SumWeightJob job{};
    job.partial = scratch.da + static_cast<int64_t>(call.shape.rank0(i)) * k;
    job.out = call.gradients[i].da;
    job.type = call.gradients[i].da_is_float ? Output::fp32 : Output::t;
    job.count = plan.da_chunks;
    job.rows = call.shape.members[i].r;
    job.rows_stride = static_cast<int64_t>(k) * plan.rank;
    job.cols = job.partial_cols = k;
    job.scale = 1.0f;
    return job;
}

}  // namespace afa
