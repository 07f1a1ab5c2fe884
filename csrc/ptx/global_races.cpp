#include "ptx/global_races.h"

#include <algorithm>

#include "ptx/state.h"

namespace ptx {
namespace {

constexpr uint64_t kGranule = 2;
constexpr uint32_t kAtomics = 1u << 31;      // of a writer: atomics have come since
constexpr uint32_t kNoncoherent = 1u << 31;  // of a reader: one by ld.global.nc
constexpr uint32_t kSeveral = kNoncoherent - 1;

std::string place(const Allocation& allocation, uint64_t address, Access access) {
    const char* verb = access == Access::store    ? "stores to '"
                       : access == Access::atomic ? "an atomic on '"
                                                  : "loads from '";
    return verb + allocation.name + "' at byte " + std::to_string(address - allocation.address);
}

std::string cta_name(int64_t number) { return "the CTA with number " + std::to_string(number); }

}  // namespace

GlobalRaces::GlobalRaces(const AllocationTable& table) : table_(table), intervals_(1) {
    uint64_t granules = 0, region = 0, end = 0;  // where the current region starts and ends
    for (size_t k = 0; k < table.size(); ++k) {
        const Allocation& a = table[k];
        if (k == 0 || a.address >= end) {
            granules += k == 0 ? 0 : (end - region) / kGranule + 1;
            region = a.address / kGranule * kGranule;
            end = region;
        }
        origin_.push_back(region - granules * kGranule);
        end = std::max(end, a.address + a.bytes);
    }
    records_.resize(granules + (end - region) / kGranule + 1);
}

void GlobalRaces::start_cta(uint32_t number) {
    cta_ = number;
    own_ = static_cast<Moment>(intervals_.size()) << 5;
    known_.clear();
    observed_.clear();
}

void GlobalRaces::begin_interval(Warp& warp) {
    if (intervals_.size() >= kAtomics >> 5)
        throw Fault{-1, "more synchronizations in one launch than the machine can record"};
    warp.interval = static_cast<uint32_t>(intervals_.size());
    warp.interval_segment = warp.segment;
    intervals_.push_back(
        {cta_, static_cast<uint32_t>(warp.index), warp.segment, warp.cta->shared.barriers()});
}

Moment GlobalRaces::now(Warp& warp, int lane) {
    if (warp.interval_segment != warp.segment)
        begin_interval(warp);
    return warp.interval << 5 | static_cast<uint32_t>(lane);
}

bool GlobalRaces::is_before(Moment one, Moment other) const {
    const Interval &a = interval(one), &b = interval(other);
    if (a.barriers != b.barriers)
        return a.barriers < b.barriers;
    if (a.warp != b.warp)
        return false;
    return a.segment < b.segment || ((one & 31) == (other & 31) && one <= other);
}

bool GlobalRaces::is_known(Moment of_another, Moment at) const {
    const auto found = known_.find(interval(of_another).cta);
    return found != known_.end() &&
           std::any_of(found->second.begin(), found->second.end(), [&](const Known& k) {
               return is_before(of_another, k.released) && is_before(k.since, at);
           });
}

// A CTA whose store or atomic is not ordered before the access; -1: none.
int64_t GlobalRaces::unordered_writer(const Record& record, uint64_t address, Moment at,
                                      Access access) const {
    const Moment store = record.writer & ~kAtomics;
    if (store && !is_own(store) && !is_known(store, at))
        return interval(store).cta;
    if (access == Access::atomic || !(record.writer & kAtomics))
        return -1;
    const auto word = words_.find(address / 4);
    if (word == words_.end())
        return -1;
    // Each atomic has read what those before it have left, whatever it acquires.
    const std::vector<Moment>& all = word->second.accesses;
    for (auto last = all.rbegin(); last != all.rend(); ++last) {
        if (is_own(*last) ? is_before(*last, at) : is_known(*last, at))
            return -1;
        if (!is_own(*last))
            return interval(*last).cta;
    }
    return -1;
}

void GlobalRaces::check(Warp& warp, int lane, const Allocation& allocation, uint64_t address,
                        uint32_t bytes, Access access) {
    if (!(warp.in_order >> lane & 1))
        throw Fault{lane, "race: " + place(allocation, address, access) +
                              " without griddepcontrol.wait, and the kernel before this one may "
                              "still run"};
    const Moment at = now(warp, lane);
    const uint32_t mine = cta_ + 1;
    const bool load = access == Access::load || access == Access::noncoherent_load;
    const uint64_t first = (address - origin_[table_.index(allocation)]) / kGranule;
    for (uint64_t i = first; i < first + (bytes + kGranule - 1) / kGranule; ++i) {
        Record& record = records_[i];
        if (record.writer && (!is_own(record.writer) || record.writer & kAtomics)) {
            const int64_t other =
                unordered_writer(record, address + (i - first) * kGranule, at, access);
            if (other >= 0)
                throw Fault{lane, "race: " + place(allocation, address, access) + ", which " +
                                      cta_name(other) +
                                      " has written, without a release and an acquire between"};
        }
        const uint32_t reader = record.reader & ~kNoncoherent;
        if (load) {
            if (access == Access::noncoherent_load && record.writer)
                throw Fault{lane, place(allocation, address, access) +
                                      " with .nc, which this launch has written"};
            record.reader = (record.reader & kNoncoherent) |
                            (reader && reader != mine ? kSeveral : mine) |
                            (access == Access::noncoherent_load ? kNoncoherent : 0);
            continue;
        }
        if (record.reader & kNoncoherent)
            throw Fault{lane, place(allocation, address, access) +
                                  ", which this launch has loaded with .nc"};
        // One record cannot tell the last access of many readers, and no kernel orders them.
        if (reader && reader != mine)
            throw Fault{lane, "race: " + place(allocation, address, access) + ", which " +
                                  cta_name(reader != kSeveral ? reader - 1 : cta_ == 0) +
                                  " has read"};
        if (access == Access::atomic) {
            record.writer |= kAtomics;
        } else {
            if (record.writer & kAtomics)
                words_.erase((address + (i - first) * kGranule) / 4);
            record.writer = at;
        }
    }
}

void GlobalRaces::learn(const std::vector<Moment>& released, Moment since) {
    for (Moment moment : released)
        if (!is_own(moment))
            known_[interval(moment).cta].push_back({moment, since});
}

void GlobalRaces::publish(AtomicWord& word, Moment moment) const {
    std::vector<Moment>& all = word.released;
    all.push_back(moment);
    for (const auto& [cta, of_cta] : known_)
        for (const Known& known : of_cta)
            if (is_before(known.since, moment))
                all.push_back(known.released);
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
}

void GlobalRaces::synchronize(Warp& warp, int lane, uint64_t address, Order order) {
    const Moment at = now(warp, lane);
    AtomicWord& word = words_[address / 4];
    word.accesses.push_back(at);
    begin_interval(warp);
    if (order.acquires)
        learn(word.released, now(warp, lane));
    else if (!word.released.empty())
        observed_.push_back({at, word.released});
    const Moment released = order.releases ? at : warp.fences[lane];
    if (released)
        publish(word, released);
}

void GlobalRaces::fence(Warp& warp) {
    for (int lane = 0; lane < kLanes; ++lane)
        if (warp.active >> lane & 1)
            warp.fences[lane] = now(warp, lane);
    begin_interval(warp);
    const auto fenced = [&](const Observed& o) {
        return interval(o.at).warp == static_cast<uint32_t>(warp.index) &&
               (warp.active >> (o.at & 31) & 1);
    };
    for (const Observed& o : observed_)
        if (fenced(o))
            learn(o.released, now(warp, static_cast<int>(o.at & 31)));
    observed_.erase(std::remove_if(observed_.begin(), observed_.end(), fenced), observed_.end());
}

}  // namespace ptx
