// Executes one instruction for some lanes of a warp: what it reads must have been written, and what
// it writes must not be in use by a wgmma.
#pragma once

#include <string>

#include "ptx_machine/state.h"

namespace ptx {

[[noreturn]] inline void undefined(const Warp& warp, uint32_t number, uint32_t lanes) {
    const std::string& name = warp.kernel->register_names[number];
    if (warp.pinned[number])
        throw Fault{-1, "uses " + name + ", which a wgmma that has not been waited for will write"};
    throw Fault{__builtin_ctz(lanes & ~warp.state[number].defined),
                "reads " + name + ", which nothing has written"};
}

// A compiler may join a half with one that it does not care for, and never use that one. It is a
// NaN of either 16-bit type then; false: both halves are undefined.
inline bool joined_with_nothing(Warp& warp, const Instruction& i, uint32_t k, uint32_t lanes) {
    if (!i.joins_halves || i.read_count != 2 ||
        (lanes & ~(warp.state[i.reads[0]].defined | warp.state[i.reads[1]].defined)))
        return false;
    for (int lane = 0; lane < kLanes; ++lane)
        if ((lanes & ~warp.state[i.reads[k]].defined) >> lane & 1)
            warp.values[i.op[1 + k] + lane] = 0x7FFF;
    return true;
}

// Products whose registers the instruction touches.
inline void note_products(Warp& warp, const Instruction& i) {
    Needs& needs = warp.cta->needs;
    for (uint32_t k = 0; k < i.read_count; ++k)
        needs.touch(warp.result_of[i.reads[k]]);
    for (uint32_t k = 0; k < i.write_count; ++k) {
        needs.touch(warp.result_of[i.writes[k]]);
        needs.touch(warp.fragment_of[i.writes[k]]);
    }
}

inline void execute(Warp& warp, const Instruction& i, uint32_t lanes) {
    warp.active = lanes;
    if (!warp.result_of.empty())
        note_products(warp, i);
    for (uint32_t k = 0; k < i.read_count; ++k) {
        RegisterState& state = warp.state[i.reads[k]];
        if ((lanes & ~state.defined) && !joined_with_nothing(warp, i, k, lanes))
            undefined(warp, i.reads[k], lanes);
        state.accessed_at = warp.executed;
    }
    for (uint32_t k = 0; k < i.write_count; ++k) {
        if (warp.pinned[i.writes[k]])
            throw Fault{-1, "writes " + warp.kernel->register_names[i.writes[k]] +
                                ", which a wgmma that has not been waited for uses"};
        warp.state[i.writes[k]].accessed_at = warp.executed;
    }
    i.execute(warp, i);
    for (uint32_t k = 0; k < i.write_count; ++k)
        warp.state[i.writes[k]].defined |= lanes;
}

}  // namespace ptx
