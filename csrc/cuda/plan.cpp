#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "cuda/tiles.h"

namespace afa {

double waves(const KernelPlan& plan, const DeviceLimits& device) {
    const double blocks = static_cast<double>(plan.grid_x) * plan.grid_y;
    return blocks / (static_cast<double>(device.sm_count) * std::max(1, plan.blocks_per_sm));
}

double tail(const KernelPlan& plan, const DeviceLimits& device) {
    const double full = waves(plan, device);
    return full <= 1 ? 0 : 1 - full / std::ceil(full);
}

namespace {

// Constants, since the order of sums must not depend on the device. Column blocks of the expand
// kernel: about two blocks on each multiprocessor of the GPUs of today.
constexpr int64_t kExpandBlocks = 256;
// The number of chunks is the best one for these GPUs together: A100, H100 and B200.
constexpr DeviceLimits kChosenFor[] = {
    {108, 163 << 10, 164 << 10}, {132, 227 << 10, 228 << 10}, {148, 227 << 10, 228 << 10}};
// The share of the multiprocessors that has to have a block for the full bandwidth.
constexpr double kBusyShare = 0.8;
// From here on one block per tile of rows has enough bytes under way to go through all segments;
// with more, it makes y too.
constexpr int64_t kWholeRowBlocks = 48, kOnePassRowBlocks = 96;
// Scratch memory of the rows that a backward takes at once; it should stay in the L2 cache.
constexpr int64_t kRoundBytes = 32 << 20;
// Most scratch memory of the partial results of dA, and of dB, where there is more than one.
constexpr int64_t kPartialBytes = 12 << 20;
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kRoundUnit = 128;    // rows, whole tiles of every kernel
constexpr int64_t kMinChunkTiles = 2;  // what a block keeps and what it leaves behind must pay
// What bandwidth times latency asks of a multiprocessor of B200, and more than twice what it asks
// of one of H100 or A100 (a model: no GPU has confirmed it).
constexpr int64_t kBytesUnderWay = 48 * 1024;
constexpr int kReservedPerBlock = 1024;  // shared memory that CUDA keeps per block
constexpr int kRegistersPerSm = 65536;
constexpr int kMaxFeatures =
    1 << 30;  // column indices are 32-bit, with room for a tile beyond the end

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return std::max(low, std::min(value, high));
}

// The number of stages for a grid: the one that slows the kernel least; among equals, the one with
// most bytes under way.
template <typename Bytes>
KernelPlan ring(const char* kernel, int threads, int registers, const DeviceLimits& device,
                int64_t grid_x, int64_t grid_y, const Bytes& bytes) {
    KernelPlan best;
    int64_t most = 0;
    double least = 0;
    for (int stages = 2; stages <= kMaxStages; ++stages) {
        const int shared = bytes(stages);
        if (shared > device.shared_per_block)
            break;
        const int fit = std::max(1, std::min(device.shared_per_sm / (shared + kReservedPerBlock),
                                             kRegistersPerSm / (registers * threads)));
        const int stage_bytes = bytes(3) - bytes(2);
        const KernelPlan plan{kernel,  grid_x,    static_cast<int>(grid_y),
                              threads, stages,    stage_bytes,
                              shared,  registers, fit};
        // Blocks that the grid really gives a multiprocessor.
        const int64_t resident = std::min<int64_t>(fit, ceil_div(grid_x * grid_y, device.sm_count));
        const int64_t under_way = resident * (stages - 1) * stage_bytes;
        // Than on a full GPU: for a last wave that is not full, or for too few bytes under way.
        const double slower = std::max(
            {1.0, 1 / (1 - tail(plan, device)), static_cast<double>(kBytesUnderWay) / under_way});
        if (most == 0 || slower < least || (slower == least && under_way > most)) {
            best = plan;
            most = under_way;
            least = slower;
        }
    }
    if (most == 0)
        throw std::invalid_argument(
            std::string(kernel) + " kernel: needs " + std::to_string(bytes(2)) +
            " bytes of shared memory, the device gives " + std::to_string(device.shared_per_block));
    return best;
}

void check(const Shape& shape) {
    if (shape.m < 1 || shape.k < 1 || shape.n < 1 || shape.k > kMaxFeatures ||
        shape.n > kMaxFeatures)
        throw std::invalid_argument("shape out of range: " + describe(shape));
    if (shape.k % kVector || shape.n % kVector)
        throw std::invalid_argument("K and N must be multiples of 8: " + describe(shape));
}

int splits_of(int64_t row_blocks, int width) {
    return row_blocks >= kWholeRowBlocks ? 1 : static_cast<int>(ceil_div(width, segment_of(width)));
}

// A kernel with a block for each slab of columns and chunk of rows. Few chunks leave a GPU idle,
// many cost the traffic of their partial results (R columns for each column of the slab), and what
// matters most is that the last wave of blocks is full.
template <class Tile, int R, typename Bytes>
KernelPlan chunked(const char* kernel, int registers, const DeviceLimits& device, int64_t m,
                   int width, const Bytes& bytes, int64_t& rows_of_chunk) {
    const int64_t tiles = ceil_div(m, Tile::kRows), slabs = ceil_div(width, Tile::kColumns);
    const auto plan = [&](const DeviceLimits& target, int64_t chunks) {
        return ring(kernel, Tile::kThreads, registers, target, slabs, chunks, bytes);
    };
    const auto chunk_rows = [&](int64_t chunks) { return ceil_div(tiles, chunks) * Tile::kRows; };
    const int64_t most = std::min(
        {ceil_div(tiles, kMinChunkTiles), device.chunk_limit > 0 ? device.chunk_limit : kMaxChunks,
         std::max<int64_t>(1, kPartialBytes / (4 * R * static_cast<int64_t>(width)))});
    int64_t best = 1;
    double least = 0;
    for (int64_t wanted = 1; wanted <= most; ++wanted) {
        const int64_t chunks = ceil_div(m, chunk_rows(wanted));
        if (chunks < wanted)
            continue;  // an equal number of whole tiles in each makes fewer
        double cost = 1;
        for (const DeviceLimits& target : kChosenFor)
            cost = std::max({cost, 1 / (1 - tail(plan(target, chunks), target)),
                             kBusyShare * target.sm_count / static_cast<double>(slabs * chunks)});
        cost *= 1 + 2.0 * R * chunks / static_cast<double>(m);
        if (least == 0 || cost < least) {
            least = cost;
            best = chunks;
        }
    }
    rows_of_chunk = chunk_rows(best);
    return plan(device, best);
}

template <int R>
ForwardPlan forward_of(const Shape& shape, const DeviceLimits& device) {
    using Tile = RowTile<R>;
    const int64_t row_blocks = ceil_div(shape.m, Tile::kRows);
    const int64_t column_tiles = ceil_div(shape.n, Tile::kColumns);
    ForwardPlan plan{};
    plan.rank = R;
    plan.segment = segment_of(shape.k);
    plan.one_pass =
        row_blocks >= kOnePassRowBlocks || (shape.k <= plan.segment && column_tiles < 4);
    plan.splits = plan.one_pass ? 1 : splits_of(row_blocks, shape.k);
    plan.forward = ring("forward", Tile::kThreads, Tile::kRegisters, device, row_blocks, 1,
                        Tile::forward_bytes);
    plan.project = ring("project", Tile::kThreads, Tile::kRegisters, device, row_blocks,
                        plan.splits, Tile::forward_bytes);
    plan.expand =
        ring("expand", Tile::kThreads, Tile::kExpandRegisters, device, row_blocks,
             clamp(ceil_div(kExpandBlocks, row_blocks), 1, column_tiles), Tile::expand_bytes);
    return plan;
}

// Partial sums of dh: one for each slab of the dy kernel, or those of the project kernel.
template <int R>
int dh_parts_of(int64_t m, int n) {
    if constexpr (R <= 32)
        return static_cast<int>(ceil_div(n, DyTile<R>::kColumns));
    else
        return splits_of(ceil_div(m, RowTile<R>::kRows), n);
}

// Rows that a backward takes at once: all, or equal parts whose dh, dz, h and z fit kRoundBytes.
template <int R>
int64_t round_rows(const Shape& shape, const DeviceLimits& device) {
    const int64_t row_bytes = 4 * R * static_cast<int64_t>(dh_parts_of<R>(shape.m, shape.n)) +
                              2 * R + (R > 32 ? 2 * R : 0) + 2 * shape.r;
    const int64_t most = device.round_limit > 0 ? device.round_limit : kRoundBytes / row_bytes;
    const int64_t rounds = ceil_div(shape.m, std::max(most, kRoundUnit));
    return ceil_div(ceil_div(shape.m, rounds), kRoundUnit) * kRoundUnit;
}

template <int R>
BackwardPlan backward_of(const Shape& all, const DeviceLimits& device) {
    using Outer = OuterTile<R>;
    using Row = RowTile<R>;
    BackwardPlan plan{};
    plan.rank = R;
    plan.rows = std::min(all.m, round_rows<R>(all, device));
    plan.rounds = static_cast<int>(ceil_div(all.m, plan.rows));
    const Shape shape{plan.rows, all.k, all.n, all.r};
    plan.one_pass_dy = R <= 32;
    plan.dh_parts = dh_parts_of<R>(shape.m, shape.n);
    plan.x = chunked<Outer, R>("x", Outer::kXRegisters, device, shape.m, shape.k, Outer::x_bytes,
                               plan.da_rows);
    plan.da_chunks = plan.x.grid_y;
    if constexpr (R <= 32) {
        using Dy = DyTile<R>;
        plan.dy =
            chunked<Dy, R>("dy", Dy::kRegisters, device, shape.m, shape.n, Dy::bytes, plan.db_rows);
        plan.db_chunks = plan.dy.grid_y;
    } else {
        plan.segment = segment_of(shape.n);
        plan.project_dy = ring("project_dy", Row::kThreads, Row::kRegisters, device,
                               ceil_div(shape.m, Row::kRows), plan.dh_parts, Row::dy_project_bytes);
        plan.db = chunked<Outer, R>("db", Outer::kDbRegisters, device, shape.m, shape.n,
                                    Outer::db_bytes, plan.db_rows);
        plan.db_chunks = plan.db.grid_y;
    }
    for (KernelPlan* kernel : {&plan.dy, &plan.project_dy, &plan.db, &plan.x})
        kernel->launches = plan.rounds;
    return plan;
}

bool operator==(const Shape& a, const Shape& b) {
    return std::tie(a.m, a.k, a.n, a.r) == std::tie(b.m, b.k, b.n, b.r);
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
    check(shape);
    const Plan plan = make();
    entries[next++ % std::size(entries)] = {shape, device, plan};
    return plan;
}

// f of the rank class as a constant.
template <typename F>
auto with_rank(int r, const F& f) {
    switch (rank_class(r)) {
    case 16:
        return f(std::integral_constant<int, 16>{});
    case 32:
        return f(std::integral_constant<int, 32>{});
    case 64:
        return f(std::integral_constant<int, 64>{});
    default:
        return f(std::integral_constant<int, kMaxRank>{});
    }
}

}  // namespace

int rank_class(int r) {
    for (const int rank : {16, 32, 64, kMaxRank})
        if (r >= 1 && r <= rank)
            return rank;
    throw std::invalid_argument("rank: expected 1 to " + std::to_string(kMaxRank) + ", got " +
                                std::to_string(r));
}

int tile_rows(int rank) { return rank == kMaxRank ? RowTile<128>::kRows : RowTile<64>::kRows; }

int segment_of(int width) {
    const int64_t units = ceil_div(width, kSegmentUnit);
    return static_cast<int>(ceil_div(units, kMaxSegments)) * kSegmentUnit;
}

ForwardPlan plan_forward(const Shape& shape, const DeviceLimits& device) {
    return remembered<ForwardPlan>(shape, device, [&] {
        return with_rank(shape.r, [&](auto rank) { return forward_of<rank>(shape, device); });
    });
}

BackwardPlan plan_backward(const Shape& shape, const DeviceLimits& device) {
    return remembered<BackwardPlan>(shape, device, [&] {
        return with_rank(shape.r, [&](auto rank) { return backward_of<rank>(shape, device); });
    });
}

std::string describe(const Shape& shape) {
    return "M=" + std::to_string(shape.m) + ", K=" + std::to_string(shape.k) +
           ", N=" + std::to_string(shape.n) + ", r=" + std::to_string(shape.r);
}

std::string describe(const KernelPlan& plan, const Shape& shape) {
    return describe(shape) + ", grid " + std::to_string(plan.grid_x) + " x " +
           std::to_string(plan.grid_y) + ", " + std::to_string(plan.threads) + " threads, " +
           std::to_string(plan.shared_bytes) + " bytes of shared memory";
}

}  // namespace afa
