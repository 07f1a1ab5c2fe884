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
// most bytes under way, of which there are `stage_bytes` in a tile.
template <typename Bytes>
KernelPlan ring(const char* kernel, int threads, int registers, const DeviceLimits& device,
                int64_t grid_x, int64_t grid_y, int stage_bytes, const Bytes& bytes) {
    KernelPlan best;
    int64_t most = 0;
    double least = 0;
    for (int stages = 2; stages <= kMaxStages; ++stages) {
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

// The best ring for a kernel that streams a weight: `bytes(stages, weights)`. Where floats have no
// room beside it, they are rounded as they are read.
template <typename Bytes>
KernelPlan streaming(const char* kernel, int threads, int registers, const DeviceLimits& device,
                     int64_t grid_x, int64_t grid_y, Weights weights, const Bytes& bytes) {
    const bool staged =
        weights == Weights::rounded && bytes(2, Streamed::staged) <= device.shared_per_block;
    const Streamed kept = staged                            ? Streamed::staged
                          : weights == Weights::as_they_are ? Streamed::tiles
                                                            : Streamed::unstaged;
    // Floats count as what they become: most of what is under way has to be x or dy.
    const int stage_bytes = bytes(3, Streamed::tiles) - bytes(2, Streamed::tiles);
    KernelPlan plan = ring(kernel, threads, registers, device, grid_x, grid_y, stage_bytes,
                           [&](int stages) { return bytes(stages, kept); });
    plan.staged = staged;
    return plan;
}

void check(const Shape& shape) {
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
}

int splits_of(int64_t row_blocks, int width) {
    return row_blocks >= kWholeRowBlocks ? 1 : static_cast<int>(ceil_div(width, segment_of(width)));
}

// A kernel with a block for each slab of columns and chunk of rows. Few chunks leave a GPU idle,
// many cost the traffic of their partial results (R columns for each column of the slab), and what
// matters most is that the last wave of blocks is full.
template <class Tile, int R, typename Bytes>
KernelPlan chunked(const char* kernel, int registers, const DeviceLimits& device, int64_t m,
                   int64_t slabs, const Bytes& bytes, int64_t& rows_of_chunk) {
    const int64_t tiles = ceil_div(m, Tile::kRows), width = slabs * Tile::kColumns;
    const auto plan = [&](const DeviceLimits& target, int64_t chunks) {
        return ring(kernel, Tile::kThreads, registers, target, slabs, chunks, bytes(3) - bytes(2),
                    bytes);
    };
    const auto chunk_rows = [&](int64_t chunks) { return ceil_div(tiles, chunks) * Tile::kRows; };
    const int64_t most = std::min({ceil_div(tiles, kMinChunkTiles),
                                   device.chunk_limit > 0 ? device.chunk_limit : kMaxChunks,
                                   std::max<int64_t>(1, kPartialBytes / (4 * R * width))});
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
ForwardPlan forward_of(const Shape& shape, Weights weights, const DeviceLimits& device) {
    using Tile = RowTile<R>;
    const int64_t row_blocks = ceil_div(shape.m, Tile::kRows);
    const int64_t columns = column_tiles(shape, shape.count);
    ForwardPlan plan{};
    plan.rank = R;
    plan.segment = segment_of(shape.k);
    plan.one_pass = row_blocks >= kOnePassRowBlocks || (shape.k <= plan.segment && columns < 4);
    plan.splits = plan.one_pass ? 1 : splits_of(row_blocks, shape.k);
    plan.forward = streaming("forward", Tile::kThreads, Tile::kRegisters, device, row_blocks, 1,
                             weights, Tile::forward_bytes);
    plan.project = streaming("project", Tile::kThreads, Tile::kRegisters, device, row_blocks,
                             plan.splits, weights, Tile::forward_bytes);
    plan.expand = streaming("expand", Tile::kThreads, Tile::kExpandRegisters, device, row_blocks,
                            clamp(ceil_div(kExpandBlocks, row_blocks), 1, columns), weights,
                            Tile::expand_bytes);
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

// Bytes of a round for each of its rows: dh, dz, h and z.
template <int R>
int64_t row_bytes(const Shape& shape) {
    int64_t parts = 0, ranks = 0;
    for (int i = 0; i < shape.count; ++i) {
        parts += dh_parts_of<R>(shape.m, shape.members[i].n);
        ranks += shape.members[i].r;
    }
    return 4 * R * parts + 2 * rank_class(shape) + (R > 32 ? 2 * R : 0) + 2 * ranks;
}

// Rows that a backward takes at once: all, or equal parts whose scratch memory fits kRoundBytes.
template <int R>
int64_t round_rows(const Shape& shape, const DeviceLimits& device) {
    const int64_t most =
        device.round_limit > 0 ? device.round_limit : kRoundBytes / row_bytes<R>(shape);
    const int64_t rounds = ceil_div(shape.m, std::max(most, kRoundUnit));
    return ceil_div(ceil_div(shape.m, rounds), kRoundUnit) * kRoundUnit;
}

// The pass over dy; R is the rank class of the largest member.
template <int R>
BackwardPlan dy_pass_of(const Shape& shape, Weights weights, const DeviceLimits& device) {
    using Outer = OuterTile<R>;
    using Row = RowTile<R>;
    BackwardPlan plan{};
    plan.dy_rank = R;
    plan.rows = std::min(shape.m, round_rows<R>(shape, device));
    plan.rounds = static_cast<int>(ceil_div(shape.m, plan.rows));
    plan.one_pass_dy = R <= 32;
    for (int i = 0; i < shape.count; ++i)
        plan.dh_parts[i] = dh_parts_of<R>(plan.rows, shape.members[i].n);
    if constexpr (R <= 32) {
        using Dy = DyTile<R>;
        plan.dy = chunked<Dy, R>("dy", Dy::kRegisters, device, plan.rows,
                                 dy_slabs(shape, shape.count), Dy::bytes, plan.db_rows);
        plan.db_chunks = plan.dy.grid_y;
    } else {
        const int n = shape.members[0].n;
        plan.segment = segment_of(n);
        plan.project_dy = streaming("project_dy", Row::kThreads, Row::kRegisters, device,
                                    ceil_div(plan.rows, Row::kRows), plan.dh_parts[0], weights,
                                    Row::dy_project_bytes);
        plan.db = chunked<Outer, R>("db", Outer::kDbRegisters, device, plan.rows,
                                    ceil_div(n, Outer::kColumns), Outer::db_bytes, plan.db_rows);
        plan.db_chunks = plan.db.grid_y;
    }
    return plan;
}

// The pass over x; R is the rank class of all members together.
template <int R>
void add_x_pass(BackwardPlan& plan, const Shape& shape, const DeviceLimits& device) {
    using Outer = OuterTile<R>;
    plan.rank = R;
    plan.x = chunked<Outer, R>("x", Outer::kXRegisters, device, plan.rows,
                               ceil_div(shape.k, Outer::kColumns), Outer::x_bytes, plan.da_rows);
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
Plan remembered(const Shape& shape, Weights weights, const DeviceLimits& device, const Make& make) {
    struct Entry {
        Shape shape{};
        Weights weights{};
        DeviceLimits device{};
        Plan plan{};
    };
    thread_local Entry entries[32];
    thread_local unsigned next = 0;
    for (const Entry& entry : entries)
        if (entry.shape == shape && entry.weights == weights && entry.device == device)
            return entry.plan;
    check(shape);
    const Plan plan = make();
    entries[next++ % std::size(entries)] = {shape, weights, device, plan};
    return plan;
}

// f of the rank class as a constant.
template <typename F>
auto with_rank(int rank, const F& f) {
    switch (rank) {
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

int rank_class(const Shape& shape) {
    return rank_class(shape.count == 1 ? shape.members[0].r : shape.rank0(shape.count));
}

int tile_rows(int rank) { return rank == kMaxRank ? RowTile<128>::kRows : RowTile<64>::kRows; }

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

ForwardPlan plan_forward(const Shape& shape, Weights weights, const DeviceLimits& device) {
    return remembered<ForwardPlan>(shape, weights, device, [&] {
        return with_rank(rank_class(shape),
                         [&](auto rank) { return forward_of<rank>(shape, weights, device); });
    });
}

BackwardPlan plan_backward(const Shape& shape, Weights weights, const DeviceLimits& device) {
    return remembered<BackwardPlan>(shape, weights, device, [&] {
        int largest = 0;
        for (int i = 0; i < shape.count; ++i)
            largest = std::max(largest, shape.members[i].r);
        BackwardPlan plan = with_rank(rank_class(largest), [&](auto rank) {
            return dy_pass_of<rank>(shape, weights, device);
        });
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

}  // namespace afa
