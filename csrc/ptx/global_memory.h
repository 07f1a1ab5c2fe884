// The global memory that a launch may touch, to the byte.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "ptx/machine.h"

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
    // "outside every allocation; the nearest is x (512 bytes at 0x...), 4 bytes behind its end"
    std::string describe(uint64_t address, uint32_t bytes) const;

  private:
    static bool contains(const Allocation& a, uint64_t address, uint32_t bytes) {
        return address >= a.address && bytes <= a.bytes && address - a.address <= a.bytes - bytes;
    }
    const Allocation* search(uint64_t address, uint32_t bytes, Hint& hint) const;

    std::vector<Allocation> allocations_;  // by address
};

}  // namespace ptx
