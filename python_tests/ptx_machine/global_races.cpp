#include "ptx_machine/global_races.h"

#include <algorithm>

#include "ptx_machine/state.h"

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

void GlobalRaces::begin_interval(Warp& warp, uint32_t line) {
    if (intervals_.size() >= kAtomics >> 5)
        throw Fault{-1, "more synchronizations in one launch than the machine can record"};
    intervals_[warp.interval].ended_by = line;
    warp.interval = static_cast<uint32_t>(intervals_.size());
    warp.interval_segment = warp.segment;
    intervals_.push_back({cta_, static_cast<uint32_t>(warp.index), warp.segment,
                          warp.cta->shared.barriers(), warp.barrier_line, line, 0});
}

Moment GlobalRaces::now(Warp& warp, int lane) {
    if (warp.interval_segment != warp.segment)
        begin_interval(warp, 0);
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

// What an order relies on: the atomics or fences of both sides, and a barrier that alone stands
// between one of them and the access.
std::set<uint32_t> GlobalRaces::needed_lines(Moment of_another, const Known& known,
                                             Moment at) const {
    const Interval &access = interval(of_another), &release = interval(known.released);
    const Interval &acquire = interval(known.since), &here = interval(at);
    std::set<uint32_t> lines{release.ended_by, acquire.begun_by};
    if (access.warp != release.warp && access.barriers + 1 == release.barriers)
        lines.insert(release.barrier_line);
    if (acquire.warp != here.warp && acquire.barriers + 1 == here.barriers)
        lines.insert(here.barrier_line);
    return lines;
}

bool GlobalRaces::is_known(const Warp& warp, Moment of_another, Moment at) const {
    const auto found = known_.find(interval(of_another).cta);
    if (found == known_.end())
        return false;
    std::set<uint32_t> of_all;  // lines that each of the orders needs
    bool is_ordered = false;
    for (const Known& known : found->second) {
        if (!is_before(of_another, known.released) || !is_before(known.since, at))
            continue;
        if (!warp.cta->launch->explain)
            return true;
        const std::set<uint32_t> lines = needed_lines(of_another, known, at);
        if (!is_ordered)
            of_all = lines;
        for (auto line = of_all.begin(); line != of_all.end();)
            line = lines.count(*line) ? std::next(line) : of_all.erase(line);
        is_ordered = true;
    }
    for (const uint32_t line : of_all)
        warp.cta->needs.add(line);
    return is_ordered;
}

// A CTA whose store or atomic is not ordered before the access; -1: none.
int64_t GlobalRaces::unordered_writer(const Warp& warp, const Record& record, uint64_t address,
                                      Moment at, Access access) const {
    const Moment store = record.writer & ~kAtomics;
    if (store && !is_own(store) && !is_known(warp, store, at))
        return interval(store).cta;
    if (access == Access::atomic || !(record.writer & kAtomics))
        return -1;
    const auto word = words_.find(address / 4);
    if (word == words_.end())
        return -1;
    // Each atomic has read what those before it have left, whatever it acquires.
    const std::vector<Moment>& all = word->second.accesses;
    for (auto last = all.rbegin(); last != all.rend(); ++last) {
        if (is_own(*last) ? is_before(*last, at) : is_known(warp, *last, at))
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
                unordered_writer(warp, record, address + (i - first) * kGranule, at, access);
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

void GlobalRaces::synchronize(Warp& warp, int lane, uint64_t address, Order order, uint32_t line) {
    const Moment at = now(warp, lane);
    AtomicWord& word = words_[address / 4];
    word.accesses.push_back(at);
    begin_interval(warp, line);
    if (order.acquires)
        learn(word.released, now(warp, lane));
    if (!word.released.empty())
        observed_.push_back({at, word.released});
    if (order.releases)
        publish(word, at);
    if (warp.fences[lane])
        publish(word, warp.fences[lane]);
}

void GlobalRaces::fence(Warp& warp, uint32_t line) {
    for (int lane = 0; lane < kLanes; ++lane)
        if (warp.active >> lane & 1)
            warp.fences[lane] = now(warp, lane);
    begin_interval(warp, line);
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
