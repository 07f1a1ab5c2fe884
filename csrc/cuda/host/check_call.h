// What the kernels ask of a call's operands beyond what checks.py has checked; a fault raises
// std::invalid_argument.
#pragma once

#include <stdexcept>
#include <string>

#include "common/activation.h"
#include "cuda/host/ops.h"
#include "cuda/kernels/tiles.h"

namespace afa {

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline void check_matrix(const char* name, const void* data, int64_t stride, const Shape& shape) {
    if (data && (!aligned(data) || stride % kVector))
        throw std::invalid_argument(std::string(name) +
                                    ": expected 16-byte aligned rows, got row stride " +
                                    std::to_string(stride) + " (" + describe(shape) + ")");
}

// z [M, r] is read and written two elements at a time where r is even.
inline void check_z(const void* z, int r, const Shape& shape) {
    if (r % 2 == 0 && reinterpret_cast<uintptr_t>(z) % 4)
        throw std::invalid_argument("z: expected an address that is a multiple of 4 (" +
                                    describe(shape) + ")");
}

inline void check_call(const BranchCall& call) {
    if (call.threshold < 0 || call.threshold > 255 || (call.threshold && !call.seed))
        throw std::invalid_argument("dropout out of range (" + describe(call.shape) + ")");
    for (int i = 0; i < call.shape.count; ++i) {
        const MemberOperands& member = call.members[i];
        if (member.activation < 0 || member.activation >= kActivationCount)
            throw std::invalid_argument("activation out of range (" + describe(call.shape) + ")");
        if (!member.alpha_t && member.activation != static_cast<int>(Activation::identity))
            throw std::invalid_argument("alpha_t: expected a value where there is an activation (" +
                                        describe(call.shape) + ")");
    }
    check_matrix("x", call.x, call.x_stride, call.shape);
}

}  // namespace afa
