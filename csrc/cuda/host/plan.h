// Launch parameters as a pure function of shape and device: no CUDA, testable anywhere.
//
// What decides the order of a sum depends on the shape alone, so that results agree bit for bit on
// all GPUs; the device decides only how many tiles are under way. In the sums that make a row of y,
// z or dx it does not even depend on M, so that a row has the same bits in any call: x and dy are
// summed in segments whose length depends on K or N alone, and what M decides is whether one block
// goes through all segments of a tile of rows or one block through each.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/kernels/launch.h"

namespace afa {

struct DeviceLimits {
    int sm_count;
    int shared_per_block;  // bytes that one block may ask for
    int shared_per_sm;
    // Most chunks of rows, and most rows of a round; 0: no limit. Only tests set them, to reach
    // long chunks and several rounds with few rows, and measurements (variant.h).
    int chunk_limit = 0, round_limit = 0;
};

struct ForwardPlan {
    int rank;       // the rank class: all ranks together, padded to 16, 32 or 64
    bool one_pass;  // forward kernel; else project and expand
    int segment;    // columns of x that are summed for themselves
    int splits;     // blocks that share the sum over K: 1, or one per segment
    KernelPlan forward, project, expand;
};

struct BackwardPlan {
    int rank;          // the rank class of the x pass, and of dz: that of the forward
    int dy_rank;       // the rank class of the dy pass: that of the largest member
    int64_t rows;      // of a round: all of this plan is done once for each `rows` rows of the call
    int rounds;        // so that scratch memory does not grow with M
    bool one_pass_dy;  // dy kernel; else project_dy and db kernels
    int segment;       // columns of dy that are summed for themselves (project_dy kernel)
    int dh_parts[kMaxMembers];  // partial sums of dh of each member: slabs of the dy kernel, or
                                // splits of the project_dy kernel
    int db_chunks, da_chunks;
    int64_t db_rows, da_rows;  // rows of a chunk
    KernelPlan dy, project_dy, db, x;
};

// Columns of a segment of a sum over `width` columns: at most kMaxSegments segments, each a whole
// number of kSegmentUnit columns. afa_kernels/backend/triton/launch.py has the same rule.
constexpr int kSegmentUnit = 256;
int segment_of(int width);

// The padded rank. Raises std::invalid_argument beyond kMaxRank.
int rank_class(int r);
// That of all members together, and of the largest.
int rank_class(const Shape& shape);
int largest_rank_class(const Shape& shape);
constexpr int kMaxMemberRank = 32;  // of several

// Column tiles of all members in the forward and expand kernels, and slabs in the dy kernel, up to
// member i.
int column_tiles(const Shape& shape, int i);
int dy_slabs(const Shape& shape, int i);

// Raise std::invalid_argument where the shape or the device cannot be served; the message says why.
ForwardPlan plan_forward(const Shape& shape, const DeviceLimits& device);
BackwardPlan plan_backward(const Shape& shape, const DeviceLimits& device);

// Waves of blocks that the grid needs on the device, and the share of their time in which the last
// one leaves multiprocessors without a block.
double waves(const KernelPlan& plan, const DeviceLimits& device);
double tail(const KernelPlan& plan, const DeviceLimits& device);

std::string describe(const Shape& shape);
std::string describe(const KernelPlan& plan, const Shape& shape);

}  // namespace afa
