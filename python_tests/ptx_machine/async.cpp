// cp.async: data arrives when its thread waits for it, and until then the destination is poison.
#include "ptx_machine/async.h"

#include <algorithm>

#include "ptx_machine/forms.h"
#include "ptx_machine/memory.h"

namespace ptx {
namespace {

// Operands: [target], [source], bytes (, source bytes).
template <bool kWithSourceBytes, bool kSixteenOnly>
void copy(Warp& warp, const Instruction& i) {
    const uint32_t bytes = i.op[6];
    if (kSixteenOnly ? bytes != 16 : bytes != 4 && bytes != 8 && bytes != 16)
        throw Fault{-1, "cannot copy " + std::to_string(bytes) + " bytes"};
    AsyncCopies copies;
    copies.lanes = warp.active;
    copies.bytes = bytes;
    copies.fill = i.line == warp.cta->launch->unfilled_line ? 0x3F : 0;  // numbers near 1
    const Address to(warp, i.op), from(warp, i.op + 3);
    Counters& counters = warp.cta->counters;
    WarpTraffic whole;
    for (uint32_t rest = warp.active; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const uint64_t target = to[lane], source = from[lane];
        const uint32_t wanted = kWithSourceBytes ? warp.in<uint32_t>(i.op[7])[lane] : bytes;
        if (wanted > bytes)
            throw Fault{lane, "copies " + std::to_string(wanted) + " of " + std::to_string(bytes) +
                                  " bytes"};
        if (source % bytes)
            throw Fault{lane, "copies " + std::to_string(bytes) +
                                  " bytes from an address that is not a multiple of their number"};
        const Allocation* found =
            wanted ? warp.cta->global->find(source, wanted, warp.hint) : nullptr;
        if (wanted && !found)
            throw Fault{lane, "copies " + warp.cta->global->describe(source, wanted)};
        if (wanted)
            warp.cta->races->check(warp, lane, *found, source, wanted, Access::load);
        if (wanted == bytes)
            whole.add(source, found);
        else if (wanted)
            warp.cta->traffic[warp.cta->global->index(*found)].read += wanted;
        if (target > 0xFFFFFFFFull)
            throw Fault{lane, "the address of shared memory has more than 32 bits"};
        copies.target[lane] = static_cast<uint32_t>(target);
        copies.source[lane] = reinterpret_cast<const unsigned char*>(source);
        copies.source_bytes[lane] = wanted;
        copies.group[lane] = warp.commits[lane];
        warp.cta->shared.issue(warp, lane, copies.target[lane], bytes);
        ++counters.async_copies;
        counters.async_copy_bytes += wanted;
    }
    whole.count(*warp.cta->global, bytes, false, warp.cta->traffic, counters);
    warp.copies.push_back(copies);
}

void commit(Warp& warp, const Instruction& i) {
    for (uint32_t rest = warp.active; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        ++warp.commits[lane];
        if (warp.cta->launch->explain)
            warp.lane_groups[lane].commits.push_back(i.line);
    }
}

void wait(Warp& warp, const Instruction& i) {
    const uint32_t pending = i.op[0];
    Needs& needs = warp.cta->needs;
    const auto ended = [&](const Ended& e) {
        return (warp.active >> e.lane & 1) &&
               !needs.is_late(e.operation, warp.lane_groups[e.lane], e.group, {i.line, pending});
    };
    warp.ended_copies.erase(
        std::remove_if(warp.ended_copies.begin(), warp.ended_copies.end(), ended),
        warp.ended_copies.end());
    for (AsyncCopies& copies : warp.copies) {
        for (uint32_t rest = copies.lanes & warp.active; rest; rest &= rest - 1) {
            const int lane = __builtin_ctz(rest);
            if (copies.group[lane] + pending >= warp.commits[lane])
                continue;
            warp.cta->shared.arrive(warp, lane, copies.target[lane], copies.bytes,
                                    copies.source[lane], copies.source_bytes[lane], copies.fill);
            copies.lanes &= ~(1u << lane);
            if (warp.cta->launch->explain) {
                const uint32_t group = copies.group[lane];
                const uint32_t operation =
                    needs.end(warp.lane_groups[lane], group, {i.line, pending});
                warp.ended_copies.push_back({operation, group, lane});
                warp.cta->shared.mark_copy(copies.target[lane], copies.bytes, operation);
            }
        }
    }
    warp.copies.erase(std::remove_if(warp.copies.begin(), warp.copies.end(),
                                     [](const AsyncCopies& c) { return c.lanes == 0; }),
                      warp.copies.end());
}

}  // namespace

int lane_with_copies(const Warp& warp, uint32_t lanes) {
    for (const AsyncCopies& copies : warp.copies)
        if (copies.lanes & lanes)
            return __builtin_ctz(copies.lanes & lanes);
    return -1;
}

void add_async_forms(Forms& f) {
    f.add("cp.async.ca.shared.global", "mmn", copy<false, false>);
    f.add("cp.async.ca.shared.global", "mmnd", copy<true, false>);
    f.add("cp.async.cg.shared.global", "mmn", copy<false, true>);
    f.add("cp.async.cg.shared.global", "mmnd", copy<true, true>);
    f.add("cp.async.commit_group", "", commit);
    f.add("cp.async.wait_group", "n", wait);
}

}  // namespace ptx
