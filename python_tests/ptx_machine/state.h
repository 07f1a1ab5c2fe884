// What is alive while a CTA runs: warps, their registers, and the memory they share.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "ptx_machine/global_memory.h"
#include "ptx_machine/global_races.h"
#include "ptx_machine/needs.h"
#include "ptx_machine/program.h"
#include "ptx_machine/shared_memory.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Thrown by executors; the scheduler adds kernel, CTA, warp and line.
struct Fault {
    int lane;  // -1: the whole warp
    std::string what;
};

struct RegisterState {
    uint32_t defined;      // lanes that have written it
    uint32_t accessed_at;  // the warp's instruction count when it was last read or written
};

// When a wgmma last accessed a register.
struct ProductAccess {
    uint32_t at;
    uint32_t shape;  // whose accumulator it was; 0: it was a fragment of A
};

// Lanes that are at the same instruction.
struct Group {
    uint32_t pc, lanes;
    bool parked;  // at a collective, where it waits for the other lanes
};

// Copies that one cp.async instruction has issued and whose data has not arrived.
struct AsyncCopies {
    uint32_t lanes;
    uint32_t bytes;
    uint32_t group[kLanes];  // number of the lane's commit group
    uint32_t target[kLanes];
    const unsigned char* source[kLanes];
    uint32_t source_bytes[kLanes];
    unsigned char fill;  // of the bytes behind those of the source
};

// What a wait has ended, a copy of one lane or a product, and what a change of the text would leave
// in flight: see Needs.
struct Ended {
    uint32_t operation, group;
    int lane;
};

// Reads of shared memory by wgmma instructions that no wait has completed.
struct GroupReads {
    uint32_t group = 0;                             // number of the commit group
    std::vector<uint32_t> units;                    // addresses of 16 bytes each
    std::vector<uint32_t> accumulators, fragments;  // numbers of the registers in use
};

struct alignas(128) LaneBlock {
    uint32_t words[kLanes];
};

struct Cta;

struct Warp {
    Cta* cta = nullptr;
    const Kernel* kernel = nullptr;
    int index = 0;
    std::vector<LaneBlock> storage;
    uint32_t* values = nullptr;  // the same as words
    std::vector<RegisterState> state;
    std::vector<uint16_t> pinned;  // by register: number of wgmma in flight that use it
    std::vector<ProductAccess> product_access;
    uint32_t live = 0;      // lanes that have not returned
    uint32_t in_order = 0;  // lanes that know the kernels before this one to have ended
    uint32_t active = 0;    // lanes that execute the current instruction
    std::vector<Group> groups;
    size_t current = 0;  // index into groups
    bool at_barrier = false;
    uint32_t barrier = 0, barrier_line = 0;  // of the last bar.sync
    uint32_t segment = 0;                    // see SharedMemory
    uint32_t executed = 0;

    uint32_t interval = 0, interval_segment = 0;  // see GlobalRaces; its segment
    Moment fences[kLanes] = {};                   // the last one of each lane

    uint32_t carry = 0, carry_defined = 0;  // by lane

    uint32_t commits[kLanes] = {};  // of cp.async, per lane
    std::vector<AsyncCopies> copies;

    LastFence register_fence;    // wgmma.fence, by `executed`
    LastFence proxy_fence;       // fence.proxy.async, by the segment that it begins
    uint32_t group_commits = 0;  // of wgmma
    std::vector<GroupReads> group_reads;
    uint64_t group_history = 0;  // of the wgmma executed, to be the same in a warpgroup

    // Only where the launch is to explain.
    Groups lane_groups[kLanes], product_groups;
    std::vector<Ended> ended_copies, ended_products;
    std::vector<uint32_t> result_of, fragment_of;  // by register: ended products

    std::vector<unsigned char> local;  // kLanes times Kernel::local_bytes
    AllocationTable::Hint hint;

    template <typename T>
    const T* in(uint32_t place) const {
        return reinterpret_cast<const T*>(values + place);
    }
    uint32_t predicate(uint32_t place) const { return values[place]; }
    void set_predicate(uint32_t place, uint32_t bits) {
        values[place] = (values[place] & ~active) | (bits & active);
    }
    // Writes the active lanes.
    template <typename T>
    void out(uint32_t place, const T (&result)[kLanes]) {
        T* to = reinterpret_cast<T*>(values + place);
        if (active == kAllLanes) {
            std::memcpy(to, result, sizeof(result));
            return;
        }
        for (int lane = 0; lane < kLanes; ++lane)
            if (active >> lane & 1)
                to[lane] = result[lane];
    }
};

struct Cta {
    const Launch* launch = nullptr;
    const Kernel* kernel = nullptr;
    const AllocationTable* global = nullptr;
    GlobalRaces* races = nullptr;
    uint32_t number = 0;  // of this CTA in the grid
    uint32_t id[3] = {};
    SharedMemory shared;
    std::vector<Warp> warps;
    std::mt19937_64 random;
    Counters counters;
    std::vector<Traffic> traffic;  // by allocation
    Needs needs;
};

// scheduler.cpp
Counters run(const Program& program, const Kernel& kernel, const Launch& launch);

}  // namespace ptx
