// Branches, barriers and shuffles. The scheduler does what their Flow says.
#include <algorithm>

#include "ptx_machine/forms.h"
#include "ptx_machine/state.h"

namespace ptx {
namespace {

void nothing(Warp&, const Instruction&) {}

void require_members(const Warp& warp, const uint32_t* masks) {
    for (uint32_t rest = warp.active; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        if ((masks[lane] & warp.live) != warp.live)
            throw Fault{lane, "synchronizes with some lanes of the warp only"};
    }
}

void sync_block(Warp& warp, const Instruction& i) {
    warp.barrier = i.op[0];
    warp.barrier_line = i.line;
}

// The threads of other warps are not told apart: each has to wait for itself, although a barrier
// behind the wait of one would do.
void wait_for_grids(Warp& warp, const Instruction&) { warp.in_order |= warp.active; }

void sync_warp(Warp& warp, const Instruction& i) {
    require_members(warp, warp.in<uint32_t>(i.op[0]));
    warp.segment = warp.cta->shared.new_segment(warp.index);
}

// Operands: result, value, source lane, clamp and segments, members.
void shuffle_index(Warp& warp, const Instruction& i) {
    const uint32_t *value = warp.in<uint32_t>(i.op[1]), *source = warp.in<uint32_t>(i.op[2]),
                   *control = warp.in<uint32_t>(i.op[3]);
    require_members(warp, warp.in<uint32_t>(i.op[4]));
    uint32_t result[kLanes] = {};
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        if (!(warp.active >> lane & 1))
            continue;
        const uint32_t segment = control[lane] >> 8 & 31, clamp = control[lane] & 31;
        const uint32_t last = (lane & segment) | (clamp & ~segment);
        uint32_t from = (lane & segment) | (source[lane] & 31 & ~segment);
        if (from > last)
            from = lane;
        if (!(warp.active >> from & 1))
            throw Fault{static_cast<int>(lane),
                        "shuffles from lane " + std::to_string(from) + ", which has returned"};
        result[lane] = value[from];
    }
    warp.out(i.op[0], result);
}

// Operands: result, value, members. Every lane gets the sum of all.
void sum_lanes(Warp& warp, const Instruction& i) {
    const uint32_t* value = warp.in<uint32_t>(i.op[1]);
    require_members(warp, warp.in<uint32_t>(i.op[2]));
    uint32_t sum = 0;
    for (uint32_t rest = warp.active; rest; rest &= rest - 1)
        sum += value[__builtin_ctz(rest)];
    uint32_t result[kLanes];
    std::fill(result, result + kLanes, sum);
    warp.out(i.op[0], result);
}

}  // namespace

void add_control_forms(Forms& f) {
    f.add("bra", "b", nothing, Flow::branch);
    f.add("bra.uni", "b", nothing, Flow::branch);
    f.add("ret", "", nothing, Flow::exit);
    f.add("griddepcontrol.wait", "", wait_for_grids);
    f.add("griddepcontrol.launch_dependents", "", nothing);
    f.add("bar.sync", "n", sync_block, Flow::barrier);
    f.add("bar.warp.sync", "d", sync_warp, Flow::collective);
    f.add("shfl.sync.idx.b32", "Ddddd", shuffle_index, Flow::collective);
    f.add("redux.sync.add.s32", "Ddd", sum_lanes, Flow::collective);
}

}  // namespace ptx
