// The ragged operator on the device: as ops.h, for rows that are sorted by group.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/ops.h"
#include "cuda/ragged_params.h"

namespace afa {

// Of a ragged call: the lone call on all rows, with A and B of the first group, and the groups,
// whose rows, r and chunk_rows need not be filled in.
struct RaggedForwardCall : ForwardCall {
    Groups groups;
};
struct RaggedBackwardCall : BackwardCall {  // da [groups, r, K], db [groups, N, r]
    Groups groups;
    bool adds_dx;  // to the dx that there is
};

// Bytes of scratch memory. The shape is that of a lone call on all rows.
int64_t ragged_forward_workspace(const Shape& shape, int groups);
int64_t ragged_backward_workspace(const Shape& shape, int groups, bool recompute_z);

// Raise as forward and backward do. Neither waits for the device.
void ragged_forward(const RaggedForwardCall& call);
void ragged_backward(const RaggedBackwardCall& call);

// The kernels that a call with saved z launches, in order; the sums of chunks aside.
std::vector<KernelPlan> ragged_kernels_of(const Shape& shape, int groups, Weights weights,
                                          const DeviceLimits& device);

}  // namespace afa
