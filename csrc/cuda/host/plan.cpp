#include "cuda/host/plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>
#include <tuple>

#include "cuda/host/grids.h"
#include "cuda/kernels/tiles.h"

namespace afa {

namespace {

// Blocks that the device has at once.
double places(const KernelPlan& plan, const DeviceLimits& device) {
    return static_cast<double>(device.sm_count) * std::max(1, plan.blocks_per_sm);
}

}  // namespace

double waves(const KernelPlan& plan, const DeviceLimits& device) {
    return static_cast<double>(plan.grid_x) * plan.grid_y / places(plan, device);
}

double tail(const KernelPlan& plan, const DeviceLimits& device) {
    const double full = waves(plan, device);
    return full <= 1 ? 0 : 1 - full / std::ceil(full);
}

namespace {

constexpr int64_t kRoundUnit = 128;  // rows, whole tiles of every kernel
constexpr int kMaxFeatures =
    1 << 30;  // column indices are 32-bit, with room for a tile beyond the end

// A kernel with a block for each tile of rows, `grid_y` times.
template <class Tile, typename Bytes>
KernelPlan tiled(const char* kernel, const DeviceLimits& device, int64_t rows, int64_t grid_y,
                 const Bytes& bytes) {
    KernelPlan plan = ring(kernel, Tile::kThreads, Tile::kRegisters, device,
                           ceil_div(rows, Tile::kRows), grid_y, bytes(3) - bytes(2), bytes);
    plan.tile_bytes = kTileBytes<Tile>;
    return plan;
}

template <int R>
ForwardPlan forward_of(const Shape& shape, const DeviceLimits& device) {
    using Tile = RowTile<R>;
    const int64_t row_blocks = ceil_div(shape.m, Tile::kRows);
    const int64_t columns = column_tiles(shape, shape.count);
    ForwardPlan plan{};
    plan.rank = R;
    plan.segment = segment_of(shape.k);
    plan.one_pass = row_blocks >= kOnePassRowBlocks || (shape.k <= plan.segment && columns < 4);
    plan.splits = plan.one_pass ? 1 : splits_of(row_blocks, shape.k);
    plan.forward = tiled<Tile>("forward", device, shape.m, 1, Tile::forward_bytes);
    plan.project = tiled<Tile>("project", device, shape.m, plan.splits, Tile::forward_bytes);
    plan.expand =
        tiled<Tile>("expand", device, shape.m, clamp(ceil_div(kExpandGrid, row_blocks), 1, columns),
                    Tile::expand_bytes);
    return plan;
}

// Blocks of the project_dy kernel that share the sum over the columns of dy.
template <int R>
int dy_splits(int64_t m, int n) {
    return splits_of(ceil_div(m, RowTile<R>::kRows), n);
}

// Partial sums of dh: one for each slab of the dy kernel, or those of the project_dy kernel.
template <int R>
int dh_parts_of(int64_t m, int n) {
    if constexpr (R <= 32)
        return static_cast<int>(ceil_div(n, DyTile<R>::kColumns));
    else
        return dy_splits<R>(m, n);
}

// Bytes of a round for each of its rows: dh, dz and h.
template <int R>
int64_t row_bytes(const Shape& shape) {
    int64_t parts = 0;
    for (int i = 0; i < shape.count; ++i)
        parts += dh_parts_of<R>(shape.m, shape.members[i].n);
    return kFloatBytes * R * parts + kElementBytes * (rank_class(shape) + (R > 32 ? R : 0));
}

// Bytes of scratch memory: of the rows that a backward takes at once, which should stay in the L2
// cache; and of the partial results of dA, and of dB, or a share of x and every y if that is more.
constexpr int64_t kRoundBytes = 32 << 20, kPartialBytes = 12 << 20, kPartialShare = 400;

// Chunks for whose partial results of dA, or of dB, there is scratch memory.
template <int R>
int64_t most_chunks(const Shape& shape, int64_t width) {
    int64_t columns = shape.k;
    for (int i = 0; i < shape.count; ++i)
        columns += shape.members[i].n;
    return std::max(kPartialBytes, shape.m * columns * kElementBytes / kPartialShare) /
           (kFloatBytes * R * width);
}

// Rows that a backward takes at once: all, or equal parts whose scratch memory fits the limit.
template <int R>
int64_t round_rows(const Shape& shape, const DeviceLimits& device) {
    const int64_t most =
        device.round_limit > 0 ? device.round_limit : kRoundBytes / row_bytes<R>(shape);
    const int64_t rounds = ceil_div(shape.m, std::max(most, kRoundUnit));
    return ceil_div(ceil_div(shape.m, rounds), kRoundUnit) * kRoundUnit;
}

// The passes over dy; R is the rank class of the largest member.
template <int R>
BackwardPlan dy_pass_of(const Shape& shape, const DeviceLimits& device) {
    BackwardPlan plan{};
    plan.dy_rank = R;
    plan.rows = std::min(shape.m, round_rows<R>(shape, device));
    plan.rounds = static_cast<int>(ceil_div(shape.m, plan.rows));
    plan.one_pass_dy = R <= 32;
    for (int i = 0; i < shape.count; ++i)
        plan.dh_parts[i] = dh_parts_of<R>(plan.rows, shape.members[i].n);
    if constexpr (R <= 32) {
        using Dy = DyTile<R>;
        static_assert(Dy::kColumns == kSlab);
        const int64_t slabs = dy_slabs(shape, shape.count);
        plan.dy =
            chunked<Dy, R>("dy", Dy::kRegisters, device, plan.rows, slabs,
                           most_chunks<R>(shape, slabs * Dy::kColumns), Dy::bytes, plan.db_rows);
        plan.db_chunks = plan.dy.grid_y;
    } else {
        using Outer = OuterTile<R>;
        const int n = shape.members[0].n;
        const int64_t slabs = ceil_div(n, Outer::kColumns);
        plan.segment = segment_of(n);
        plan.project_dy = tiled<RowTile<R>>("project_dy", device, plan.rows, plan.dh_parts[0],
                                            RowTile<R>::dy_project_bytes);
        plan.db = chunked<Outer, R>("db", Outer::kDbRegisters, device, plan.rows, slabs,
                                    most_chunks<R>(shape, slabs * Outer::kColumns), Outer::db_bytes,
                                    plan.db_rows);
        plan.db_chunks = plan.db.grid_y;
    }
    return plan;
}

// The pass over x; R is the rank class of all members together.
template <int R>
void add_x_pass(BackwardPlan& plan, const Shape& shape, const DeviceLimits& device) {
    using Outer = OuterTile<R>;
    const int64_t slabs = ceil_div(shape.k, Outer::kColumns);
    plan.rank = R;
    plan.x = chunked<Outer, R>("x", Outer::kXRegisters, device, plan.rows, slabs,
                               most_chunks<R>(shape, slabs * Outer::kColumns), Outer::x_bytes,
                               plan.da_rows);
    plan.da_chunks = plan.x.grid_y;
    for (KernelPlan* kernel : {&plan.dy, &plan.project_dy, &plan.db, &plan.x})
        kernel->launches = plan.rounds;
}

bool operator==(const Shape& a, const Shape& b) {
    const auto same = [](MemberShape p, MemberShape q) { return p.n == q.n && p.r == q.r; };
    return std::tie(a.m, a.k, a.count) == std::tie(b.m, b.k, b.count) &&
           std::equal(a.members, a.members + a.count, b.members, same);
}
bool operator==(const DeviceLimits& a, const DeviceLimits& b) {
    return std::tie(a.sm_count, a.shared_per_block, a.shared_per_sm, a.chunk_limit,
                    a.round_limit) ==
           std::tie(b.sm_count, b.shared_per_block, b.shared_per_sm, b.chunk_limit, b.round_limit);
}

// make(), or what it returned when this thread last asked for the same: a model has few shapes, and
// asks for their plans in every step.
template <typename Plan, typename Make>
Plan remembered(const Shape& shape, const DeviceLimits& device, const Make& make) {
    struct Entry {
        Shape shape{};
        DeviceLimits device{};
        Plan plan{};
    };
    thread_local Entry entries[32];
    thread_local unsigned next = 0;
    for (const Entry& entry : entries)
        if (entry.shape == shape && entry.device == device)
            return entry.plan;
    check_shape(shape);
    const Plan plan = make();
    entries[next++ % std::size(entries)] = {shape, device, plan};
    return plan;
}

}  // namespace

void check_shape(const Shape& shape) {
    const auto fits = [](int width) { return width >= 1 && width <= kMaxFeatures; };
    const auto in_vectors = [](int width) { return width % kVector == 0; };
    bool fit = shape.m >= 1 && fits(shape.k) && shape.count >= 1 && shape.count <= kMaxMembers;
    bool vectors = in_vectors(shape.k);
    for (int i = 0; i < shape.count && fit; ++i) {
        fit = fits(shape.members[i].n);
        vectors = vectors && in_vectors(shape.members[i].n);
    }
    if (!fit)
        throw std::invalid_argument("shape out of range: " + describe(shape));
    if (!vectors)
        throw std::invalid_argument("K and N must be multiples of 8: " + describe(shape));
    for (int i = 0; i < shape.count && shape.count > 1; ++i)
        if (shape.members[i].r > kMaxMemberRank)
            throw std::invalid_argument("layers that share x have ranks up to " +
                                        std::to_string(kMaxMemberRank) + ": " + describe(shape));
    if (shape.count > 1 && shape.rank0(shape.count) > kMaxRank)
        throw std::invalid_argument(
            "layers that share x have ranks up to " + std::to_string(kMaxRank) +
            " together, each rounded up to a multiple of 16: " + describe(shape));
}

int rank_class(int r) {
    for (const int rank : {16, 32, kMaxRank})
        if (r >= 1 && r <= rank)
            return rank;
    throw std::invalid_argument("rank: expected 1 to " + std::to_string(kMaxRank) + ", got " +
                                std::to_string(r));
}

int rank_class(const Shape& shape) {
    return rank_class(shape.count == 1 ? shape.members[0].r : shape.rank0(shape.count));
}

int largest_rank_class(const Shape& shape) {
    int largest = 0;
    for (int i = 0; i < shape.count; ++i)
        largest = std::max(largest, shape.members[i].r);
    return rank_class(largest);
}

int column_tiles(const Shape& shape, int i) {
    return with_rank(rank_class(shape), [&](auto rank) {
        int64_t sum = 0;
        for (int j = 0; j < i; ++j)
            sum += ceil_div(shape.members[j].n, RowTile<rank>::kColumns);
        return static_cast<int>(sum);
    });
}

int dy_slabs(const Shape& shape, int i) {
    int64_t sum = 0;
    for (int j = 0; j < i; ++j)
        sum += ceil_div(shape.members[j].n, DyTile<kMaxMemberRank>::kColumns);
    return static_cast<int>(sum);
}

int segment_of(int width) {
    const int64_t units = ceil_div(width, kSegmentUnit);
    return static_cast<int>(ceil_div(units, kMaxSegments)) * kSegmentUnit;
}

ForwardPlan plan_forward(const Shape& shape, const DeviceLimits& device) {
    return remembered<ForwardPlan>(shape, device, [&] {
        return with_rank(rank_class(shape),
                         [&](auto rank) { return forward_of<rank>(shape, device); });
    });
}

BackwardPlan plan_backward(const Shape& shape, const DeviceLimits& device) {
    return remembered<BackwardPlan>(shape, device, [&] {
        BackwardPlan plan = with_rank(largest_rank_class(shape),
                                      [&](auto rank) { return dy_pass_of<rank>(shape, device); });
        with_rank(rank_class(shape), [&](auto rank) { add_x_pass<rank>(plan, shape, device); });
        return plan;
    });
}

std::string describe(const Shape& shape) {
    std::string n, r;
    for (int i = 0; i < shape.count; ++i) {
        const char* comma = i > 0 ? "," : "";
        n += comma + std::to_string(shape.members[i].n);
        r += comma + std::to_string(shape.members[i].r);
    }
    return "M=" + std::to_string(shape.m) + ", K=" + std::to_string(shape.k) + ", N=" + n +
           ", r=" + r;
}

std::string describe(const KernelPlan& plan, const Shape& shape) {
    return describe(shape) + ", grid " + std::to_string(plan.grid_x) + " x " +
           std::to_string(plan.grid_y) + ", " + std::to_string(plan.threads) + " threads, " +
           std::to_string(plan.shared_bytes) + " bytes of shared memory";
}

std::string kernel_failure(const LaunchConfig& config, const char* what) {
    return std::string(config.plan.kernel) + " kernel failed: " + what + " (" +
           describe(config.plan, config.shape) + ")";
}

}  // namespace afa
