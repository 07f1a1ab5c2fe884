#include "ptx/global_memory.h"

#include <cstdio>

namespace ptx {
namespace {

std::string hexadecimal(uint64_t value) {
    char text[20];
    std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

}  // namespace

AllocationTable::AllocationTable(std::vector<Allocation> allocations)
    : allocations_(std::move(allocations)) {
    std::sort(allocations_.begin(), allocations_.end(),
              [](const Allocation& a, const Allocation& b) { return a.address < b.address; });
}

// Allocations may overlap (y may be base): every one that starts at or before the address is a
// candidate, and a writable one is preferred.
const Allocation* AllocationTable::search(uint64_t address, uint32_t bytes, Hint& hint) const {
    const Allocation* found = nullptr;
    for (const Allocation& a : allocations_) {
        if (a.address > address)
            break;
        if (contains(a, address, bytes) && (!found || a.writable))
            found = &a;
    }
    if (found)
        hint = found;
    return found;
}

std::string AllocationTable::describe(uint64_t address, uint32_t bytes) const {
    std::string text = std::to_string(bytes) + " bytes at " + hexadecimal(address);
    const Allocation* nearest = nullptr;
    uint64_t best = ~0ull;
    for (const Allocation& a : allocations_) {
        const uint64_t end = a.address + a.bytes;
        const uint64_t distance = address < a.address ? a.address - address
                                  : address >= end    ? address - end
                                                      : 0;
        if (distance <= best) {
            best = distance;
            nearest = &a;
        }
    }
    if (!nearest)
        return text + ": the launch has no global memory";
    text += " are outside every allocation; the nearest is '" + nearest->name + "', " +
            std::to_string(nearest->bytes) + " bytes at " + hexadecimal(nearest->address) + ", ";
    const uint64_t end = nearest->address + nearest->bytes;
    if (address < nearest->address)
        return text + std::to_string(nearest->address - address) + " bytes before it";
    if (address >= end)
        return text + std::to_string(address - end) + " bytes behind its end";
    return text + "whose end the access crosses";
}

}  // namespace ptx
