// The global memory that a launch may touch, to the byte.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "ptx_machine/machine.h"

namespace ptx {

class AllocationTable {
  public:
    // The allocation of the last access, where the next one most likely is.
    using Hint = const Allocation*;

    explicit AllocationTable(std::vector<Allocation> allocations);

    // Null if the bytes are not all in one allocation.
    const Allocation* find(uint64_t address, uint32_t bytes, Hint& hint) const {
        if (hint && contains(*hint, address, bytes))
            return hint;
        return search(address, bytes, hint);
    }
    size_t size() const { return allocations_.size(); }
    size_t index(const Allocation& a) const {
        return static_cast<size_t>(&a - allocations_.data());
    }
    const Allocation& operator[](size_t index) const { return allocations_[index]; }
    // "outside every allocation; the nearest is x (512 bytes at 0x...), 4 bytes behind its end"
    std::string describe(uint64_t address, uint32_t bytes) const;

  private:
    static bool contains(const Allocation& a, uint64_t address, uint32_t bytes) {
        return address >= a.address && bytes <= a.bytes && address - a.address <= a.bytes - bytes;
    }
    const Allocation* search(uint64_t address, uint32_t bytes, Hint& hint) const;

    std::vector<Allocation> allocations_;  // by address
};

// What one instruction of a warp moves.
class WarpTraffic {
  public:
    void add(uint64_t address, const Allocation* allocation) {
        addresses_[count_] = address;
        allocations_[count_++] = allocation;
    }
    // Adds up the accesses, of `bytes` each and aligned.
    void count(const AllocationTable& table, uint32_t bytes, bool store,
               std::vector<Traffic>& by_allocation, Counters& counters) const;

  private:
    int count_ = 0;
    uint64_t addresses_[32];
    const Allocation* allocations_[32];
};

}  // namespace ptx
