// Who has touched what of global memory in a launch, for every two bytes. CTAs run in any order and
// at the same time: what one of them writes, another may only touch in order, behind an acquire of
// what was released behind the write.
//
// Happens-before. A moment is a place in the life of a thread: an interval of its warp, and its
// lane. A warp begins an interval with each of its segments (see SharedMemory), and at what
// releases or acquires. Of two moments of a CTA one comes before the other if a barrier lies
// between, if they are of one warp and the segments differ, or if they are of one thread. Between
// CTAs, an atomic that releases publishes in its word all that comes before it, and what its thread
// knows of other CTAs; an atomic on that word that acquires makes it known to its thread. A plain
// store to the word ends that.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx_machine/global_memory.h"

namespace ptx {

struct Warp;

using Moment = uint32_t;  // number of the interval << 5 | lane; 0: none

enum class Access { load, noncoherent_load, store, atomic };

// What an atomic orders among CTAs.
struct Order {
    bool acquires, releases;
};

class GlobalRaces {
  public:
    explicit GlobalRaces(const AllocationTable& table);
    void start_cta(uint32_t number);

    // An access of a lane. Throws Fault if it is not ordered behind those of other CTAs, or if a
    // kernel before this one may still touch the place.
    void check(Warp& warp, int lane, const Allocation& allocation, uint64_t address, uint32_t bytes,
               Access access);
    // Behind the check of an atomic: what it makes known. `line` is that of the PTX.
    void synchronize(Warp& warp, int lane, uint64_t address, Order order, uint32_t line);
    // A fence of the active lanes makes an atomic before it acquire, and one behind it release.
    void fence(Warp& warp, uint32_t line);

  private:
    struct Record {
        uint32_t writer = 0;  // the moment of the last plain store, and kAtomics
        uint32_t reader = 0;  // 1 + number of the CTA, or kSeveral, and kNoncoherent
    };
    struct Interval {
        uint32_t cta, warp, segment, barriers;
        // PTX lines: of the last barrier, and of an atomic or a fence at its beginning and its end.
        uint32_t barrier_line, begun_by, ended_by;
    };
    // Atomics on a word since its last plain store, in their order.
    struct AtomicWord {
        std::vector<Moment> accesses, released;
    };
    struct Known {
        Moment released, since;  // by another CTA; a moment of the current one
    };
    // What an atomic has read, for a fence behind it to acquire.
    struct Observed {
        Moment at;
        std::vector<Moment> released;
    };

    Moment now(Warp& warp, int lane);
    void begin_interval(Warp& warp, uint32_t line);
    const Interval& interval(Moment moment) const { return intervals_[moment >> 5]; }
    bool is_before(Moment one, Moment other) const;  // of one CTA
    bool is_known(const Warp& warp, Moment of_another, Moment at) const;
    std::set<uint32_t> needed_lines(Moment of_another, const Known& known, Moment at) const;
    bool is_own(Moment moment) const { return moment >= own_; }
    int64_t unordered_writer(const Warp& warp, const Record& record, uint64_t address, Moment at,
                             Access access) const;
    void learn(const std::vector<Moment>& released, Moment since);
    void publish(AtomicWord& word, Moment moment) const;

    const AllocationTable& table_;
    std::vector<Record> records_;
    // By allocation: what to subtract from an address to get the place of its record, times two.
    // Allocations that overlap share records.
    std::vector<uint64_t> origin_;
    std::vector<Interval> intervals_;
    std::unordered_map<uint64_t, AtomicWord> words_;  // by address / 4
    // Of the current CTA.
    uint32_t cta_ = 0;
    Moment own_ = 0;                                          // its first moment
    std::unordered_map<uint32_t, std::vector<Known>> known_;  // by CTA
    std::vector<Observed> observed_;
};

}  // namespace ptx
