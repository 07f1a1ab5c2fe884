#include "ptx_machine/global_memory.h"

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

void WarpTraffic::count(const AllocationTable& table, uint32_t bytes, bool store,
                        std::vector<Traffic>& by_allocation, Counters& counters) const {
    constexpr uint64_t kSector = 32;
    uint64_t sorted[32];
    std::copy(addresses_, addresses_ + count_, sorted);
    if (!std::is_sorted(sorted, sorted + count_))
        std::sort(sorted, sorted + count_);
    uint64_t sectors = 0;
    for (int k = 0; k < count_; ++k)
        sectors += k == 0 || sorted[k] / kSector != sorted[k - 1] / kSector;
    (store ? counters.written_sectors : counters.read_sectors) += sectors;
    for (int k = 0; k < count_; ++k) {
        if (k > 0 && addresses_[k] == addresses_[k - 1])
            continue;
        // Aligned accesses of one size are apart or the same.
        if (std::find(addresses_, addresses_ + k, addresses_[k]) != addresses_ + k)
            continue;
        Traffic& traffic = by_allocation[table.index(*allocations_[k])];
        (store ? traffic.written : traffic.read) += bytes;
    }
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
