// The jobs of the reduce kernel: what is made of partial sums.
#pragma once

#include "cuda/ops.h"
#include "cuda/scratch.h"
#include "cuda/tiles.h"

namespace afa {

inline float inverse_keep(int threshold) { return 256.0f / static_cast<float>(256 - threshold); }

inline int reduce_blocks(int64_t threads) {
    return static_cast<int>((threads + kReduceThreads - 1) / kReduceThreads);
}

// A launch of a kernel that has no plan, with kReduceThreads threads in a block.
inline LaunchConfig blocks_config(const BranchCall& call, const char* kernel, int64_t blocks,
                                  int shared_bytes = 0) {
    LaunchConfig config{{}, call.shape, call.stream};
    config.plan.kernel = kernel;
    config.plan.grid_x = blocks;
    config.plan.threads = kReduceThreads;
    config.plan.shared_bytes = shared_bytes;
    return config;
}

// Gathers the jobs of a launch of the reduce kernel.
class Reduction {
  public:
    Reduction() {
        for (int i = 0; i < kMaxMembers; ++i)
            params_.rows[i].first = params_.weights[i].first = kNoMember;
    }
    void add(SumRowsJob job) {
        job.first = params_.rows_blocks;
        params_.rows_blocks += reduce_blocks(job.m * job.cols / 2);
        params_.rows[rows_++] = job;
    }
    void add(SumWeightJob job) {
        job.first = weight_blocks_;
        weight_blocks_ += reduce_blocks(job.rows * job.cols);
        params_.weights[weights_++] = job;
    }
    void launch(const BranchCall& call) const {
        const int64_t blocks = static_cast<int64_t>(params_.rows_blocks) + weight_blocks_;
        if (blocks > 0)
            launch_reduce(call.dtype, blocks_config(call, "reduce", blocks), params_);
    }

  private:
    ReduceParams params_{};
    int rows_ = 0, weights_ = 0, weight_blocks_ = 0;
};

// Whether dh of a member is needed.
inline bool needs_dz(const BackwardCall& call, int i) { return call.dx || call.gradients[i].da; }

// z of a member from its partial sums.
inline SumRowsJob z_job(const BranchCall& call, const ForwardPlan& plan,
                        const BackwardScratch& scratch, int i) {
    SumRowsJob job{};
    job.partial = scratch.partial_z + call.shape.rank0(i);
    job.count = plan.splits;
    job.partial_stride = plan.rank;
    job.z_out = scratch.z[i];
    job.m = call.shape.m;
    job.r = call.shape.members[i].r;
    job.cols = call.shape.ranks(i);
    job.rank_class = plan.rank;
    job.scale = inverse_keep(call.threshold);
    return job;
}

// dz of a member, with the columns up to the next one's, or h, from the partial sums of dh. The x
// kernel, or the project_dy kernel, may do the job of a lone layer itself.
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
    job.cols = (i + 1 < call.shape.count ? call.shape.rank0(i + 1) : plan.rank) - rank0;
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
