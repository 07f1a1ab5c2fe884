// What the host code sees of the kernels: launchers by dtype and rank, in place of templates. And
// what the launchers take from it.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "cuda/kernels/params.h"

namespace afa {

enum class DType : int { bf16, fp16 };

// What one layer brings to a call: N and r.
struct MemberShape {
    int n, r;
};

// Layers that share x: a lone one, or up to kMaxMembers.
struct Shape {
    int64_t m = 0;
    int k = 0, count = 0;
    MemberShape members[kMaxMembers] = {};

    Shape() = default;
    Shape(int64_t m_, int k_, int n, int r) : m(m_), k(k_), count(1), members{{n, r}} {}
    Shape(int64_t m_, int k_, std::initializer_list<MemberShape> several) : m(m_), k(k_) {
        for (const MemberShape& member : several)
            members[count++] = member;
    }

    // Columns of z (and of h, dz, the rows of A) that member i takes, and those before it.
    int ranks(int i) const { return (members[i].r + kRankUnit - 1) / kRankUnit * kRankUnit; }
    int rank0(int i) const {
        int sum = 0;
        for (int j = 0; j < i; ++j)
            sum += ranks(j);
        return sum;
    }
    // The same columns up to those of the next member, or to the end of all `rank`.
    int own_columns(int i, int rank) const {
        return (i + 1 < count ? rank0(i + 1) : rank) - rank0(i);
    }
};

struct KernelPlan {
    const char* kernel = "";
    int64_t grid_x = 1;
    int grid_y = 1;
    int threads = 0;
    int stages = 0;  // tiles in the ring
    int stage_bytes = 0;
    int shared_bytes = 0;
    int registers = 0;      // budget per thread
    int blocks_per_sm = 0;  // by shared memory and registers
    int tile_bytes = 0;     // of x, dy or y that a turn of a main loop takes
    int launches = 1;       // in a backward, one for each round
};

struct LaunchConfig {
    KernelPlan plan;
    Shape shape;
    void* stream;
};

template <typename Params>
using Launcher = void (*)(const LaunchConfig&, const Params&);

// The kernels of one rank class. A null launcher: the class does without.
struct RankKernels {
    Launcher<ForwardParams> forward, expand;
    Launcher<ProjectParams> project, project_dy;
    Launcher<DyParams> dy;
    Launcher<OuterPass> db;
    Launcher<OuterParams> x;
};

// One translation unit each, so that they compile in parallel.
const RankKernels& rank16_kernels(DType dtype);
const RankKernels& rank32_kernels(DType dtype);
const RankKernels& rank64_kernels(DType dtype);
const RankKernels& rank_kernels(DType dtype, int rank);

void launch_pack(DType dtype, const LaunchConfig& config, const PackParams& params);
void launch_reduce(DType dtype, const LaunchConfig& config, const ReduceParams& params);

// Any kernel of this build, to ask the runtime about.
const void* any_kernel();

// One warp runs every primitive once: T in[512], float values[128], uint32_t out[608]
// (prim_check.cuh).
void launch_primitive_check(DType dtype, const void* in, const float* values, uint32_t* out,
                            void* stream);

// --- What the host does for a launcher: device.cpp, plan.cpp

// What is known of a kernel, by device, so that the runtime is asked once: whether it may start
// before the kernel before it has ended.
struct KernelRecord {
    static constexpr int kDevices = 64;
    enum : int { kUnknown, kInOrder, kOverlaps };
    std::atomic<int> order[kDevices];
};

// Launches a kernel of one parameter on the device of the DeviceScope. Raises std::runtime_error
// that says whether the launch itself failed or a kernel before it.
void launch_kernel(const void* kernel, KernelRecord& record, const LaunchConfig& config,
                   void* params);

// "forward kernel failed: <what> (M=..., grid ..., shared memory ...)".
std::string kernel_failure(const LaunchConfig& config, const char* what);

}  // namespace afa
