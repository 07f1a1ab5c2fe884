// What the instructions that touch memory share: their lanes, their addresses, and the check of an
// access to global memory.
#pragma once

#include "ptx_machine/state.h"

namespace ptx {

template <typename F>
void for_active(const Warp& warp, F&& body) {
    if (warp.active == kAllLanes) {
        for (int lane = 0; lane < kLanes; ++lane)
            body(lane);
    } else {
        for (uint32_t rest = warp.active; rest; rest &= rest - 1)
            body(__builtin_ctz(rest));
    }
}

// The operand [register + offset]: three words.
struct Address {
    Address(const Warp& warp, const uint32_t* op)
        : narrow_(op[1] ? nullptr : warp.in<uint32_t>(op[0])),
          wide_(op[1] ? warp.in<uint64_t>(op[0]) : nullptr), offset_(static_cast<int32_t>(op[2])) {}
    uint64_t operator[](int lane) const {
        return (narrow_ ? narrow_[lane] : wide_[lane]) + static_cast<uint64_t>(offset_);
    }

  private:
    const uint32_t* narrow_;
    const uint64_t* wide_;
    int64_t offset_;
};

// The allocation of an access of one lane. Throws Fault if there is none, if the access is
// misaligned or not allowed, or if it races.
const Allocation* global_access(Warp& warp, int lane, uint64_t address, uint32_t bytes,
                                Access access);

}  // namespace ptx
