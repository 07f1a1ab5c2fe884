// Shared memory of a CTA: poisoned at the start, and with a record for every two bytes of who wrote
// and who read them last. All accesses of the instructions that the machine knows are of two bytes
// or more and aligned, so the records are exact.
//
// Happens-before. A warp's life is cut into segments, numbered over the CTA: a new one starts for
// every warp at a barrier of the CTA, and for one warp at bar.warp.sync and fence.proxy.async. Two
// accesses of one place, at least one a write, conflict if they are of different warps and no
// barrier lies between them, or of different lanes of a warp in one segment.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ptx_machine/needs.h"

namespace ptx {

struct Warp;

class SharedMemory {
  public:
    // With `explain`, it also finds the barriers that are needed.
    void reset(uint32_t bytes, size_t warps, bool explain);

    // Each throws Fault with the lane. `offset` is an address of the shared state space.
    const unsigned char* read(const Warp& warp, int lane, uint32_t offset, uint32_t bytes);
    void write(const Warp& warp, int lane, uint32_t offset, uint32_t bytes,
               const unsigned char* data);
    // A copy is issued: the bytes are poison until `arrive`.
    void issue(const Warp& warp, int lane, uint32_t offset, uint32_t bytes);
    void arrive(const Warp& warp, int lane, uint32_t offset, uint32_t bytes,
                const unsigned char* data, uint32_t data_bytes, unsigned char fill);
    // With `explain`: the bytes are of a copy that has ended, see Needs.
    void mark_copy(uint32_t offset, uint32_t bytes, uint32_t operation);
    // A wgmma reads through the async proxy, until `release_group_read`.
    const unsigned char* group_read(const Warp& warp, uint32_t offset, uint32_t bytes);
    void release_group_read(const Warp& warp, uint32_t offset, uint32_t bytes);
    void mark_group_read(uint32_t offset, uint32_t bytes, uint32_t operation);

    // A new segment of one warp, or of all.
    uint32_t new_segment(int warp);
    void barrier(std::vector<Warp>& warps);

    // Barriers of this CTA so far, and whether the one with that number alone stands between two
    // accesses of one place of which at least one is a write.
    uint32_t barriers() const { return barriers_; }
    bool needed(uint32_t barrier) const { return needed_.size() > barrier && needed_[barrier]; }

    uint32_t bytes() const { return static_cast<uint32_t>(data_.size()); }

  private:
    uint32_t check(int lane, uint32_t offset, uint32_t bytes, const char* verb) const;
    void check_read(const Warp& warp, int lane, uint32_t place, uint32_t record) const;
    void check_write(const Warp& warp, int lane, uint32_t place, bool same_bytes);
    void mark_read(const Warp& warp, uint32_t place, uint32_t stamp);
    void note_order(const Warp& warp, int lane, uint32_t record, bool is_read);
    void need(uint32_t barrier);
    std::string who(uint32_t record) const;
    std::string where(uint32_t place) const;
    int warp_of(uint32_t record) const { return segment_warp_[record >> 8]; }

    std::vector<unsigned char> data_;
    // A record is segment << 8 | flags | lane; 0: never. Of a copy in flight: kInFlight | warp << 8
    // | lane.
    std::vector<uint32_t> written_, read_;
    std::vector<uint8_t> group_reads_;  // number of wgmma reads in flight
    uint32_t group_reads_total_ = 0;
    std::vector<uint8_t> segment_warp_;       // by segment
    std::vector<uint32_t> segment_barriers_;  // by segment: barriers before it
    std::vector<LastFence> published_fence_;  // by warp: its proxy_fence at the last barrier
    uint32_t barriers_ = 0;
    bool explain_ = false;
    std::vector<uint8_t> needed_;  // by barrier
    // Operations that have written and read the place, and have ended.
    std::vector<uint32_t> copy_of_, product_of_;
    std::vector<uint32_t> segment_previous_;  // by segment: the one before it of the same warp
    std::vector<uint32_t> last_segment_;      // by warp
    uint32_t barrier_stamp_ = 0;  // records from here on are of this side of the barrier
};

}  // namespace ptx
