// The host code of the CUDA kernels at the sizes of real models, under UBSan: matrices of more than
// 2^31 elements, every class of ranks, layers that share x. Launches do nothing but check what they
// are told: grids that a device takes, all rows, and addresses inside of the call's own memory,
// which is nowhere.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "cuda/host/ops.h"

namespace afa {
namespace {

Shape current;
int64_t rows_seen = 0;
uintptr_t next_address = 0;
struct Range {
    uintptr_t begin, end;
};
std::vector<Range> memory;

void require(bool holds, const char* what) {
    if (holds)
        return;
    std::printf("FAILED %s: %s\n", describe(current).c_str(), what);
    std::exit(1);
}

void* allocated(int64_t bytes) {
    const uintptr_t begin = next_address;
    memory.push_back({begin, begin + static_cast<uintptr_t>(bytes)});
    next_address += (static_cast<uintptr_t>(bytes) + (1 << 20)) / 256 * 256;
    return reinterpret_cast<void*>(begin);
}

void inside(const void* data, int64_t bytes, const char* what) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    bool found = !data;
    for (const Range& range : memory)
        found |= begin >= range.begin && begin + static_cast<uintptr_t>(bytes) <= range.end;
    require(found && bytes >= 0, what);
}
void matrix(const void* data, int64_t rows, int64_t cols, int64_t stride, const char* what) {
    inside(data, ((rows - 1) * stride + cols) * 2, what);
}
void weight(const Weight& w) { matrix(w.data, w.rows, w.cols, w.row_stride, "a weight"); }

void grid(const LaunchConfig& config) {
    const KernelPlan& plan = config.plan;
    require(plan.grid_x >= 1 && plan.grid_x <= std::numeric_limits<int>::max(), "grid.x");
    require(plan.grid_y >= 1 && plan.grid_y <= 65535, "grid.y");
}

template <int R>
void project(const LaunchConfig& config, const ProjectParams& p) {
    grid(config);
    matrix(p.wide, p.m, p.w, p.wide_stride, "x or dy");
    weight(p.narrow);
    inside(p.partial, p.splits * p.m * R * 4, "partial sums of a product");
}
template <int R>
void forward(const LaunchConfig& config, const ForwardParams& p) {
    project<R>(config, p.project);
    for (int i = 0; i < p.count; ++i) {
        const ForwardMember& member = p.members[i];
        weight(member.b);
        matrix(member.y, p.project.m, member.b.rows, member.y_stride, "y");
        matrix(member.base, p.project.m, member.b.rows, member.base_stride, "base");
        matrix(member.z, p.project.m, member.z_cols, member.z_cols, "z");
    }
}
template <int R>
void dy(const LaunchConfig& config, const DyParams& p) {
    grid(config);
    require(p.rows_per_chunk * config.plan.grid_y >= p.m, "chunks of dy");
    for (const DyMember& member : p.members) {
        if (!member.dy)
            continue;
        const int64_t n = member.b.rows;
        matrix(member.dy, p.m, n, member.dy_stride, "dy");
        matrix(member.z, p.m, member.z_cols, member.z_cols, "z");
        inside(member.dh, (n + kSlab - 1) / kSlab * p.m * R * 4, "partial sums of dh");
        inside(member.db, config.plan.grid_y * n * R * 4, "partial sums of dB");
    }
}
template <int R>
void outer(const LaunchConfig& config, const OuterPass& p) {
    grid(config);
    require(p.rows_per_chunk * config.plan.grid_y >= p.m, "chunks of rows");
    matrix(p.wide, p.m, p.w, p.wide_stride, "x or dy");
    matrix(p.narrow, p.m, R, R, "dz or h");
    inside(p.partial, static_cast<int64_t>(config.plan.grid_y) * p.w * R * 4, "partial sums");
}
template <int R>
void x(const LaunchConfig& config, const OuterParams& p) {
    outer<R>(config, p);
    weight(p.a);
    matrix(p.dx, p.m, p.w, p.w, "dx");
    rows_seen += p.m;
}

template <int R>
const RankKernels& table() {
    static const RankKernels kernels{forward<R>, forward<R>, project<R>, project<R>,
                                     dy<R>,      outer<R>,   x<R>};
    return kernels;
}

// A forward and a backward of a shape, with A and B that have to be packed and rows that are
// further apart than their length.
void call(const Shape& shape, const DeviceLimits& device) {
    current = shape;
    memory.clear();
    next_address = uintptr_t{1} << 40;
    rows_seen = 0;
    const auto half = [&](int64_t cols) { return allocated(shape.m * (cols + 8) * 2); };
    ForwardCall f{};
    f.shape = shape;
    f.device = device;
    f.x_stride = shape.k + 8;
    f.x = half(shape.k);
    f.workspace = allocated(forward_workspace(shape));
    BackwardCall b{};
    b.dx = half(shape.k);
    for (int i = 0; i < shape.count; ++i) {
        const int64_t n = shape.members[i].n, r = shape.members[i].r, k = shape.k;
        f.members[i] = {{allocated(r * k * 4), k, 1, true},
                        {allocated(n * r * 4), r, 1, true},
                        nullptr,
                        0,
                        1.0f};
        void* z = half(r);
        f.outputs[i] = {half(n), n + 8, half(n), n + 8, z};
        b.gradients[i] = {half(n), n + 8, z, allocated(r * k * 4), allocated(n * r * 4),
                          true,    true};
    }
    forward(f);
    static_cast<BranchCall&>(b) = f;
    b.workspace = allocated(backward_workspace(shape));
    backward(b);
    require(rows_seen == shape.m, "some rows have no pass over x, or several");
}

}  // namespace

const RankKernels& rank16_kernels(DType) { return table<16>(); }
const RankKernels& rank32_kernels(DType) { return table<32>(); }
const RankKernels& rank64_kernels(DType) { return table<64>(); }

void launch_pack(DType, const LaunchConfig& config, const PackParams& p) {
    grid(config);
    for (const auto* jobs : {&p.a, &p.b})
        for (const PackJob& job : *jobs)
            if (job.first != kNoMember) {
                inside(job.data, static_cast<int64_t>(job.rows) * job.cols * 4, "A or B");
                matrix(job.out, job.out_rows, job.out_cols, job.out_cols, "packed A or B");
            }
}

void launch_reduce(DType, const LaunchConfig& config, const ReduceParams& p) {
    grid(config);
    for (const SumRowsJob& job : p.rows)
        if (job.first != kNoMember) {
            inside(job.partial, job.count * job.m * job.partial_stride * 4, "partial sums of dh");
            matrix(job.z, job.m, job.r, job.r, "z");
            matrix(job.dz, job.m, job.cols, job.rank_class, "dz");
            matrix(job.h, job.m, job.cols, job.rank_class, "h");
        }
    for (const SumWeightJob& job : p.weights)
        if (job.first != kNoMember) {
            const int64_t last = (job.count - 1) * job.rows_stride, rows = job.rows - 1;
            inside(job.partial, (last + rows * job.partial_cols + job.cols) * 4,
                   "partial sums of dA or dB");
            inside(job.out, job.rows * job.cols * 4, "dA or dB");
        }
}

}  // namespace afa

int main() {
    const afa::DeviceLimits devices[] = {{132, 227 << 10, 228 << 10}, {48, 99 << 10, 100 << 10}};
    int calls = 0;
    for (const auto& device : devices)
        for (const int64_t m : {1, 777, 8192, (1 << 20) + 1, 1 << 24})
            for (const int k : {8, 4096, 32768, 1 << 17})
                for (const int n : {8, 14336, 32768, 1 << 17}) {
                    for (const int r : {1, 16, 17, 32, 33, 64})
                        afa::call({m, k, n, r}, device), ++calls;
                    afa::call({m, k, {{n, 16}, {8, 5}, {n, 17}}}, device), ++calls;
                }
    std::printf("%d calls, the largest with 2^41 elements of x and of y\n", calls);
}
