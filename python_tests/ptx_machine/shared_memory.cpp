#include "ptx_machine/shared_memory.h"

#include <algorithm>
#include <cstring>

#include "ptx_machine/state.h"

namespace ptx {
namespace {

constexpr uint32_t kCopyInFlight = 0xFF000000u;
constexpr uint32_t kManyWarps = 1u << 7;
constexpr uint32_t kManyLanes = 1u << 6;
constexpr uint32_t kLaneBits = 31;
constexpr uint32_t kGranule = 2;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating-point type

}  // namespace

void SharedMemory::reset(uint32_t bytes, size_t warps, bool explain) {
    data_.assign(bytes, kPoison);
    const size_t granules = (bytes + kGranule - 1) / kGranule;
    written_.assign(granules, 0);
    read_.assign(granules, 0);
    group_reads_.assign(granules, 0);
    group_reads_total_ = 0;
    segment_warp_.assign(1, 0);
    segment_barriers_.assign(1, 0);
    barriers_ = 1;
    explain_ = explain;
    needed_.clear();
    copy_of_.assign(explain ? granules : 0, 0);
    product_of_.assign(explain ? granules : 0, 0);
    segment_previous_.assign(1, 0);
    last_segment_.assign(warps, 0);
    published_fence_.assign(warps, {});
    barrier_stamp_ = 1 << 8;
}

uint32_t SharedMemory::new_segment(int warp) {
    if (segment_warp_.size() >= kCopyInFlight >> 8)
        throw Fault{-1, "more synchronizations in one CTA than the machine can record"};
    segment_warp_.push_back(static_cast<uint8_t>(warp));
    segment_barriers_.push_back(barriers_);
    const uint32_t segment = static_cast<uint32_t>(segment_warp_.size() - 1);
    uint32_t& last = last_segment_[static_cast<size_t>(warp)];
    segment_previous_.push_back(last);
    last = segment;
    return segment;
}

void SharedMemory::barrier(std::vector<Warp>& warps) {
    barrier_stamp_ = static_cast<uint32_t>(segment_warp_.size()) << 8;
    ++barriers_;
    for (Warp& warp : warps) {
        published_fence_[static_cast<size_t>(warp.index)] = warp.proxy_fence;
        warp.segment = new_segment(warp.index);
    }
}

uint32_t SharedMemory::check(int lane, uint32_t offset, uint32_t bytes, const char* verb) const {
    if (offset % bytes)
        throw Fault{lane, std::string(verb) + " " + std::to_string(bytes) +
                              " bytes of shared memory at " + std::to_string(offset) +
                              ", which is not a multiple of their number"};
    if (offset < kSharedBase || offset - kSharedBase + bytes > data_.size())
        throw Fault{lane, std::string(verb) + " " + std::to_string(bytes) +
                              " bytes of shared memory at offset " +
                              std::to_string(static_cast<int64_t>(offset) - kSharedBase) +
                              ", of which the CTA has " + std::to_string(data_.size())};
    return offset - kSharedBase;
}

std::string SharedMemory::who(uint32_t record) const {
    if (record >= kCopyInFlight)
        return "warp " + std::to_string(record >> 8 & 0xFFFF) + ", lane " +
               std::to_string(record & kLaneBits);
    return "warp " + std::to_string(warp_of(record)) + ", lane " +
           std::to_string(record & kLaneBits);
}

std::string SharedMemory::where(uint32_t place) const {
    return "shared memory at offset " + std::to_string(place * kGranule);
}

void SharedMemory::mark_copy(uint32_t offset, uint32_t bytes, uint32_t operation) {
    const uint32_t first = (offset - kSharedBase) / kGranule;
    std::fill_n(copy_of_.begin() + first, bytes / kGranule, operation);
}

void SharedMemory::mark_group_read(uint32_t offset, uint32_t bytes, uint32_t operation) {
    const uint32_t first = (offset - kSharedBase) / kGranule;
    std::fill_n(product_of_.begin() + first, bytes / kGranule, operation);
}

void SharedMemory::need(uint32_t barrier) {
    if (needed_.size() <= barrier)
        needed_.resize(barrier + 1);
    needed_[barrier] = 1;
}

// An access of a place after the one of `record`, in order: is it the last barrier alone that makes
// it so?
void SharedMemory::note_order(const Warp& warp, int lane, uint32_t record, bool is_read) {
    if (record == 0 || record >= kCopyInFlight)
        return;
    const uint32_t segment = record >> 8;
    if ((is_read && record & kManyWarps) || warp_of(record) != warp.index) {
        if (segment_barriers_[segment] + 1 == barriers_)
            need(barriers_);
        return;
    }
    const bool other_lane =
        (is_read && record & kManyLanes) || (record & kLaneBits) != static_cast<uint32_t>(lane);
    if (other_lane && segment_previous_[warp.segment] == segment &&
        segment_barriers_[segment] + 1 == barriers_)
        need(barriers_);
}

// Called where the record is of this side of the last barrier, a copy in flight, or empty.
void SharedMemory::check_read(const Warp& warp, int lane, uint32_t place, uint32_t record) const {
    if (record == 0)
        throw Fault{lane, "reads " + where(place) + ", which nothing has written"};
    if (record >= kCopyInFlight)
        throw Fault{lane, "reads " + where(place) +
                              ", which is the destination of a cp.async that has not been waited "
                              "for, issued by " +
                              who(record)};
    if (record >> 8 == warp.segment) {
        if ((record & kLaneBits) != static_cast<uint32_t>(lane))
            throw Fault{lane, "race: reads " + where(place) + ", which " + who(record) +
                                  " has written, without bar.warp.sync between"};
    } else if (warp_of(record) != warp.index) {
        throw Fault{lane, "race: reads " + where(place) + ", which " + who(record) +
                              " has written, without a barrier between"};
    }
}

void SharedMemory::check_write(const Warp& warp, int lane, uint32_t place, bool same_bytes) {
    const uint32_t written = written_[place], read = read_[place];
    if (explain_) {
        warp.cta->needs.touch(copy_of_[place]);
        warp.cta->needs.touch(product_of_[place]);
        if (!same_bytes)
            note_order(warp, lane, written, false);
        note_order(warp, lane, read, true);
    }
    if (written >= kCopyInFlight)
        throw Fault{lane, "writes " + where(place) +
                              ", which is the destination of a cp.async that has not been waited "
                              "for, issued by " +
                              who(written)};
    if (group_reads_total_ && group_reads_[place])
        throw Fault{lane, "writes " + where(place) +
                              ", which a wgmma that has not been waited for may still read"};
    // Threads that hold the same element may all store it (Triton's replicated layouts do): equal
    // bytes are no conflict, whoever comes first.
    if (written >= barrier_stamp_ && !same_bytes) {
        if (written >> 8 == warp.segment) {
            if ((written & kLaneBits) != static_cast<uint32_t>(lane))
                throw Fault{lane, "race: writes " + where(place) + ", where " + who(written) +
                                      " has written something else, without bar.warp.sync between"};
        } else if (warp_of(written) != warp.index) {
            throw Fault{lane, "race: writes " + where(place) + ", where " + who(written) +
                                  " has written something else, without a barrier between"};
        }
    }
    if (read >= barrier_stamp_) {
        if (read & kManyWarps)
            throw Fault{lane, "race: writes " + where(place) +
                                  ", which several warps have read, one of them " + who(read) +
                                  ", without a barrier between"};
        if (read >> 8 == warp.segment) {
            if ((read & kManyLanes) || (read & kLaneBits) != static_cast<uint32_t>(lane))
                throw Fault{lane, "race: writes " + where(place) + ", which " + who(read) +
                                      " has read, without bar.warp.sync between"};
        } else if (warp_of(read) != warp.index) {
            throw Fault{lane, "race: writes " + where(place) + ", which " + who(read) +
                                  " has read, without a barrier between"};
        }
    }
}

void SharedMemory::mark_read(const Warp& warp, uint32_t place, uint32_t stamp) {
    const uint32_t before = read_[place];
    if (before < barrier_stamp_) {
        read_[place] = stamp;
    } else if (before >> 8 == warp.segment) {
        if ((before & kLaneBits) != (stamp & kLaneBits))
            read_[place] |= kManyLanes;
    } else {
        const bool others = (before & kManyWarps) || warp_of(before) != warp.index;
        read_[place] = stamp | (others ? kManyWarps : 0);
    }
}

const unsigned char* SharedMemory::read(const Warp& warp, int lane, uint32_t offset,
                                        uint32_t bytes) {
    const uint32_t start = check(lane, offset, bytes, "reads");
    const uint32_t first = start / kGranule, count = (bytes + kGranule - 1) / kGranule;
    if (explain_)
        for (uint32_t i = first; i < first + count; ++i) {
            warp.cta->needs.touch(copy_of_[i]);
            note_order(warp, lane, written_[i], false);
        }
    // One comparison for both: an empty record becomes the largest number.
    uint32_t suspicious = 0, unread = 1;
    for (uint32_t i = first; i < first + count; ++i) {
        suspicious |= written_[i] - 1 >= barrier_stamp_ - 1;
        unread &= read_[i] < barrier_stamp_;
    }
    if (suspicious)
        for (uint32_t i = first; i < first + count; ++i)
            if (written_[i] - 1 >= barrier_stamp_ - 1)
                check_read(warp, lane, i, written_[i]);
    const uint32_t stamp = warp.segment << 8 | static_cast<uint32_t>(lane);
    if (unread)
        for (uint32_t i = first; i < first + count; ++i)
            read_[i] = stamp;
    else
        for (uint32_t i = first; i < first + count; ++i)
            mark_read(warp, i, stamp);
    return data_.data() + start;
}

void SharedMemory::write(const Warp& warp, int lane, uint32_t offset, uint32_t bytes,
                         const unsigned char* data) {
    const uint32_t start = check(lane, offset, bytes, "writes");
    const uint32_t first = start / kGranule, count = (bytes + kGranule - 1) / kGranule;
    uint32_t suspicious = group_reads_total_ | (explain_ ? 1u : 0u);
    for (uint32_t i = first; i < first + count; ++i)
        suspicious |= (written_[i] >= barrier_stamp_) | (read_[i] >= barrier_stamp_);
    if (suspicious)
        for (uint32_t i = first; i < first + count; ++i) {
            const uint32_t at = (i - first) * kGranule;
            check_write(warp, lane, i,
                        !std::memcmp(data_.data() + start + at, data + at,
                                     bytes < kGranule ? bytes : kGranule));
        }
    const uint32_t stamp = warp.segment << 8 | static_cast<uint32_t>(lane);
    for (uint32_t i = first; i < first + count; ++i)
        written_[i] = stamp;
    std::memcpy(data_.data() + start, data, bytes);
}

void SharedMemory::issue(const Warp& warp, int lane, uint32_t offset, uint32_t bytes) {
    const uint32_t start = check(lane, offset, bytes, "copies to");
    const uint32_t stamp =
        kCopyInFlight | static_cast<uint32_t>(warp.index) << 8 | static_cast<uint32_t>(lane);
    for (uint32_t i = start / kGranule; i < (start + bytes) / kGranule; ++i) {
        check_write(warp, lane, i, false);
        written_[i] = stamp;
    }
    std::memset(data_.data() + start, kPoison, bytes);
}

void SharedMemory::arrive(const Warp& warp, int lane, uint32_t offset, uint32_t bytes,
                          const unsigned char* data, uint32_t data_bytes, unsigned char fill) {
    const uint32_t start = offset - kSharedBase;
    const uint32_t stamp = warp.segment << 8 | static_cast<uint32_t>(lane);
    for (uint32_t i = start / kGranule; i < (start + bytes) / kGranule; ++i)
        written_[i] = stamp;
    std::memcpy(data_.data() + start, data, data_bytes);
    std::memset(data_.data() + start + data_bytes, fill, bytes - data_bytes);
}

const unsigned char* SharedMemory::group_read(const Warp& warp, uint32_t offset, uint32_t bytes) {
    const uint32_t start = check(-1, offset, bytes, "reads");
    for (uint32_t i = start / kGranule; i < (start + bytes) / kGranule; ++i) {
        const uint32_t record = written_[i];
        if (explain_)
            warp.cta->needs.touch(copy_of_[i]);
        // What this warp has written needs the fence alone, which check_read does not know.
        const bool own = record && record < kCopyInFlight && warp_of(record) == warp.index;
        if (record - 1 >= barrier_stamp_ - 1 && !own)
            check_read(warp, -1, i, record);
        // Written through the generic proxy. A fence orders it if the writer executed it after the
        // write and before a barrier, or if this warp did after the barrier behind the write.
        const uint32_t segment = record >> 8;
        if (explain_ && !own) {
            note_order(warp, -1, record, false);
            if (segment_barriers_[warp.proxy_fence.at] == segment_barriers_[segment] + 1)
                need(segment_barriers_[segment] + 1);  // the fence has to stand behind it
        }
        const LastFence& here = warp.proxy_fence;
        const LastFence& there = published_fence_[static_cast<size_t>(warp_of(record))];
        const auto fenced = [&](uint32_t without) {
            const uint32_t at = here.without(without);
            return (own ? at > segment : segment_barriers_[at] > segment_barriers_[segment]) ||
                   there.without(without) > segment;
        };
        if (explain_)
            for (const uint32_t line : {here.line, there.line})
                if (!fenced(line))
                    warp.cta->needs.add(line);
        if (!fenced(0))
            throw Fault{-1, "wgmma reads " + where(i) + ", which " + who(record) +
                                " has written, without fence.proxy.async between"};
        ++group_reads_[i];
        ++group_reads_total_;
    }
    return data_.data() + start;
}

void SharedMemory::release_group_read(const Warp& warp, uint32_t offset, uint32_t bytes) {
    const uint32_t start = offset - kSharedBase;
    const uint32_t stamp = warp.segment << 8 | kManyLanes;
    for (uint32_t i = start / kGranule; i < (start + bytes) / kGranule; ++i) {
        --group_reads_[i];
        --group_reads_total_;
        mark_read(warp, i, stamp);
        read_[i] |= kManyLanes;
    }
}

}  // namespace ptx
