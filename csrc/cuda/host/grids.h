// How a kernel's grid and ring fit a device: what plan.cpp chooses by.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/host/plan.h"
#include "cuda/host/variant.h"
#include "cuda/kernels/params.h"
#include "cuda/kernels/tiles.h"

namespace afa {

// Numbers of chunks and rounds are the best ones for these GPUs together: A100, H100 and B200.
constexpr DeviceLimits kChosenFor[] = {
    {108, 163 << 10, 164 << 10}, {132, 227 << 10, 228 << 10}, {148, 227 << 10, 228 << 10}};
// The share of the multiprocessors that has to have a block for the full bandwidth of memory. Each
// takes at most 64 bytes a clock from L2: with this share that is 1.4 times what the memory of B200
// gives, and about three times what that of H100 or A100 does (a model: no GPU has confirmed it).
constexpr double kBusyShare = 0.65;
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinChunkTiles = 2;  // what a block keeps and what it leaves behind must pay
// What bandwidth times latency asks of a multiprocessor of B200, and more than twice what it asks
// of one of H100 or A100 (a model: no GPU has confirmed it).
constexpr int64_t kBytesUnderWay = 48 * 1024;
constexpr int kReservedPerBlock = 1024;  // shared memory that CUDA keeps per block
constexpr int kRegistersPerSm = 65536;

// Raises std::invalid_argument where the kernels cannot take the shape.
void check_shape(const Shape& shape);

// f of the rank class as a constant.
template <typename F>
auto with_rank(int rank, const F& f) {
    switch (rank) {
    case 16:
        return f(std::integral_constant<int, 16>{});
    case 32:
        return f(std::integral_constant<int, 32>{});
    default:
        return f(std::integral_constant<int, kMaxRank>{});
    }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Constants, since the order of sums must not depend on the device. Column blocks of the expand
// kernel: about two blocks on each multiprocessor of the GPUs of today.
constexpr int64_t kExpandGrid = 256;
// From here on one block per tile of rows has enough bytes under way to go through all segments;
// with more, it makes y too.
constexpr int64_t kWholeRowBlocks = 48, kOnePassRowBlocks = 96;
inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return std::max(low, std::min(value, high));
}

// Blocks that share the sum over `width` columns, where there are so many blocks of rows.
inline int splits_of(int64_t row_blocks, int width) {
    return row_blocks >= kWholeRowBlocks ? 1 : static_cast<int>(ceil_div(width, segment_of(width)));
}

// Bytes of a tile of x, dy or y.
template <class Tile>
constexpr int kTileBytes = Tile::kRows * Tile::kColumns * kElementBytes;

// The number of stages for a grid: the one that slows the kernel least; among equals, the one with
// most bytes under way, of which there are `stage_bytes` in a tile.
template <typename Bytes>
KernelPlan ring(const char* kernel, int threads, int registers, const DeviceLimits& device,
                int64_t grid_x, int64_t grid_y, int stage_bytes, const Bytes& bytes) {
    KernelPlan best;
    int64_t most = 0;
    double least = 0;
    for (int stages = 2; stages <= variant().stages; ++stages) {
        const int shared = bytes(stages);
        if (shared > device.shared_per_block)
            break;
        const int fit = std::max(1, std::min(device.shared_per_sm / (shared + kReservedPerBlock),
                                             kRegistersPerSm / (registers * threads)));
        const KernelPlan plan{kernel,  grid_x,    static_cast<int>(grid_y),
                              threads, stages,    stage_bytes,
                              shared,  registers, fit};
        // Blocks that the grid really gives a multiprocessor.
        const int64_t resident = std::min<int64_t>(fit, ceil_div(grid_x * grid_y, device.sm_count));
        const int64_t under_way = resident * (stages - 1) * stage_bytes;
        // Than on a full GPU: for blocks that do not fill it, or for too few bytes under way.
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

// How much longer than on a full GPU a grid takes, on the worst of those that it is chosen for.
// `plan(target)` is the kernel on one of them.
template <typename Plan>
double slowdown(const Plan& plan) {
    double worst = 1;
    for (const DeviceLimits& target : kChosenFor) {
        const KernelPlan kernel = plan(target);
        const double blocks = static_cast<double>(kernel.grid_x) * kernel.grid_y;
        worst = std::max(
            {worst, 1 / (1 - tail(kernel, target)), kBusyShare * target.sm_count / blocks});
    }
    return worst;
}

// A kernel with a block for each slab of columns and chunk of rows. Few chunks leave a GPU idle,
// many cost the traffic of their partial results (R columns for each column of the slab), and what
// matters most is that the last wave of blocks is full.
template <class Tile, int R, typename Bytes>
KernelPlan chunked(const char* kernel, int registers, const DeviceLimits& device, int64_t m,
                   int64_t slabs, int64_t most_chunks, const Bytes& bytes, int64_t& rows_of_chunk) {
    const int64_t tiles = ceil_div(m, Tile::kRows);
    const auto plan = [&](const DeviceLimits& target, int64_t chunks) {
        KernelPlan found = ring(kernel, Tile::kThreads, registers, target, slabs, chunks,
                                bytes(3) - bytes(2), bytes);
        found.tile_bytes = kTileBytes<Tile>;
        return found;
    };
    const auto chunk_rows = [&](int64_t chunks) { return ceil_div(tiles, chunks) * Tile::kRows; };
    const int64_t most = std::min({ceil_div(tiles, kMinChunkTiles),
                                   device.chunk_limit > 0 ? device.chunk_limit : kMaxChunks,
                                   std::max<int64_t>(1, most_chunks)});
    int64_t best = 1;
    double least = 0;
    for (int64_t wanted = 1; wanted <= most; ++wanted) {
        const int64_t chunks = ceil_div(m, chunk_rows(wanted));
        if (chunks < wanted)
            continue;  // an equal number of whole tiles in each makes fewer
        const double cost =
            slowdown([&](const DeviceLimits& target) { return plan(target, chunks); }) *
            (1 + 2.0 * R * chunks / static_cast<double>(m));
        if (least == 0 || cost < least) {
            least = cost;
            best = chunks;
        }
    }
    rows_of_chunk = chunk_rows(best);
    return plan(device, best);
}

}  // namespace afa
