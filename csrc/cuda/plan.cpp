#include "cuda/plan.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/tiles.h"

namespace afa {
namespace {

// Blocks that fill the GPUs of today about twice; a constant, since the order of sums must not
// depend on the device.
constexpr int64_t kTargetBlocks = 256;
// From here on one block per tile of rows has enough bytes under way to go through all segments;
// with more, it makes y too.
constexpr int64_t kWholeRowBlocks = 48, kOnePassRowBlocks = 96;
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinChunkTiles = 2;  // what a block keeps and what it leaves behind must pay
// Twice what bandwidth times latency asks of an SM of the largest GPUs.
constexpr int kBytesUnderWay = 64 * 1024;
constexpr int kReservedPerBlock = 1024;  // shared memory that CUDA keeps per block
constexpr int kRegistersPerSm = 65536;
constexpr int kMaxFeatures =
    1 << 30;  // column indices are 32-bit, with room for a tile beyond the end

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return std::max(low, std::min(value, high));
}

// Among the rings that keep enough bytes under way, the one that leaves room for most blocks, and
// of those the deepest; without one that is enough, the one that keeps most.
template <typename Bytes>
KernelPlan ring(const char* kernel, int threads, int registers, const DeviceLimits& device,
                const Bytes& bytes) {
    KernelPlan best;
    int most_blocks = 0, most_bytes = 0;
    for (int stages = 2; stages <= kMaxStages; ++stages) {
        const int shared = bytes(stages);
        if (shared > device.shared_per_block)
            break;
        const int blocks = std::min(device.shared_per_sm / (shared + kReservedPerBlock),
                                    kRegistersPerSm / (registers * threads));
        const int under_way = blocks * (stages - 1) * (bytes(3) - bytes(2));
        const bool enough = under_way >= kBytesUnderWay, had_enough = most_bytes >= kBytesUnderWay;
        const bool better = enough && had_enough ? blocks > most_blocks || (blocks == most_blocks &&
                                                                            under_way > most_bytes)
                                                 : under_way > most_bytes;
        if (better) {
            most_blocks = blocks;
            most_bytes = under_way;
            best = {kernel, 1, 1, threads, stages, shared, registers, blocks};
        }
    }
    if (most_bytes == 0)
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

// Chunks of rows beside `slabs` blocks of columns, and the rows of each.
int chunks_of(int64_t m, int64_t slabs, int tile_rows, const DeviceLimits& device, int64_t& rows) {
    const int64_t tiles = ceil_div(m, tile_rows);
    const int64_t most = device.chunk_limit > 0 ? device.chunk_limit : kMaxChunks;
    const int64_t chunks =
        clamp(ceil_div(kTargetBlocks, slabs), 1, std::min(ceil_div(tiles, kMinChunkTiles), most));
    rows = ceil_div(tiles, chunks) * tile_rows;
    return static_cast<int>(ceil_div(m, rows));
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
    plan.forward = ring("forward", Tile::kThreads, Tile::kRegisters, device, Tile::forward_bytes);
    plan.forward.grid_x = row_blocks;
    plan.project = plan.forward;
    plan.project.kernel = "project";
    plan.project.grid_y = plan.splits;
    plan.expand =
        ring("expand", Tile::kThreads, Tile::kExpandRegisters, device, Tile::expand_bytes);
    plan.expand.grid_x = row_blocks;
    plan.expand.grid_y =
        static_cast<int>(clamp(ceil_div(kTargetBlocks, row_blocks), 1, column_tiles));
    return plan;
}

template <int R>
BackwardPlan backward_of(const Shape& shape, const DeviceLimits& device) {
    using Outer = OuterTile<R>;
    using Row = RowTile<R>;
    BackwardPlan plan{};
    plan.rank = R;
    plan.one_pass_dy = R <= 32;
    const int64_t x_slabs = ceil_div(shape.k, Outer::kColumns);
    plan.da_chunks = chunks_of(shape.m, x_slabs, Outer::kRows, device, plan.da_rows);
    plan.x = ring("x", Outer::kThreads, Outer::kXRegisters, device, Outer::x_bytes);
    plan.x.grid_x = x_slabs;
    plan.x.grid_y = plan.da_chunks;
    if constexpr (R <= 32) {
        using Dy = DyTile<R>;
        const int64_t slabs = ceil_div(shape.n, Dy::kColumns);
        plan.dh_parts = static_cast<int>(slabs);
        plan.db_chunks = chunks_of(shape.m, slabs, Dy::kRows, device, plan.db_rows);
        plan.dy = ring("dy", Dy::kThreads, Dy::kRegisters, device, Dy::bytes);
        plan.dy.grid_x = slabs;
        plan.dy.grid_y = plan.db_chunks;
    } else {
        const int64_t row_blocks = ceil_div(shape.m, Row::kRows),
                      slabs = ceil_div(shape.n, Outer::kColumns);
        plan.segment = segment_of(shape.n);
        plan.dh_parts = splits_of(row_blocks, shape.n);
        plan.project_dy =
            ring("project_dy", Row::kThreads, Row::kRegisters, device, Row::dy_project_bytes);
        plan.project_dy.grid_x = row_blocks;
        plan.project_dy.grid_y = plan.dh_parts;
        plan.db_chunks = chunks_of(shape.m, slabs, Outer::kRows, device, plan.db_rows);
        plan.db = ring("db", Outer::kThreads, Outer::kDbRegisters, device, Outer::db_bytes);
        plan.db.grid_x = slabs;
        plan.db.grid_y = plan.db_chunks;
    }
    return plan;
}

}  // namespace

int rank_class(int r) {
    for (const int rank : {16, 32, 64, kMaxRank})
        if (r >= 1 && r <= rank)
            return rank;
    throw std::invalid_argument("rank: expected 1 to " + std::to_string(kMaxRank) + ", got " +
                                std::to_string(r));
}

int segment_of(int width) {
    const int64_t units = ceil_div(width, kSegmentUnit);
    return static_cast<int>(ceil_div(units, kMaxSegments)) * kSegmentUnit;
}

ForwardPlan plan_forward(const Shape& shape, const DeviceLimits& device) {
    check(shape);
    switch (rank_class(shape.r)) {
    case 16:
        return forward_of<16>(shape, device);
    case 32:
        return forward_of<32>(shape, device);
    case 64:
        return forward_of<64>(shape, device);
    default:
        return forward_of<128>(shape, device);
    }
}

BackwardPlan plan_backward(const Shape& shape, const DeviceLimits& device) {
    check(shape);
    switch (rank_class(shape.r)) {
    case 16:
        return backward_of<16>(shape, device);
    case 32:
        return backward_of<32>(shape, device);
    case 64:
        return backward_of<64>(shape, device);
    default:
        return backward_of<128>(shape, device);
    }
}

double waves(const KernelPlan& plan, const DeviceLimits& device) {
    const double blocks = static_cast<double>(plan.grid_x) * plan.grid_y;
    return blocks / (static_cast<double>(device.sm_count) * std::max(1, plan.blocks_per_sm));
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
