// Runs the CTAs of a launch: warps take turns drawn from the seed, each with its own program
// counter; lanes of a warp that have branched apart run one group after the other, the group that
// is furthest behind in the text first, and meet again where their program counters do.
#include <algorithm>
#include <numeric>

#include "ptx_machine/async.h"
#include "ptx_machine/execute.h"
#include "ptx_machine/state.h"
#include "ptx_machine/wgmma.h"

namespace ptx {
namespace {

enum class Stop { turn_over, waits, returned };

std::string join(const uint32_t (&v)[3]) {
    return "(" + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ", " + std::to_string(v[2]) +
           ")";
}

// Merges groups that have met, and chooses the one to run: the least program counter of those that
// need not wait. False: all wait for lanes that will not come.
bool choose_group(Warp& warp) {
    std::vector<Group>& groups = warp.groups;
    for (size_t a = 0; a < groups.size(); ++a)
        for (size_t b = a + 1; b < groups.size();) {
            if (groups[a].pc == groups[b].pc) {
                groups[a].lanes |= groups[b].lanes;
                groups[a].parked |= groups[b].parked;
                groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(b));
            } else {
                ++b;
            }
        }
    bool found = false;
    for (size_t k = 0; k < groups.size(); ++k) {
        if (groups[k].parked && groups[k].lanes == warp.live)
            groups[k].parked = false;
        if (!groups[k].parked && (!found || groups[k].pc < groups[warp.current].pc)) {
            warp.current = k;
            found = true;
        }
    }
    return found;
}

void leave(Warp& warp, uint32_t lanes) {
    const int busy = lane_with_copies(warp, lanes);
    for (const Ended& copy : warp.ended_copies)
        if (lanes >> copy.lane & 1)
            warp.cta->needs.touch(copy.operation);
    for (const Ended& product : warp.ended_products)
        warp.cta->needs.touch(product.operation);
    if (busy >= 0)
        throw Fault{busy, "returns with a cp.async that has not been waited for"};
    if (!warp.group_reads.empty())
        throw Fault{-1, "returns with a wgmma that has not been waited for"};
    if (lanes & ~warp.in_order)
        throw Fault{__builtin_ctz(lanes & ~warp.in_order),
                    "returns without griddepcontrol.wait: a kernel that waits for this one would "
                    "not wait for those before it"};
    for (const Group& other : warp.groups)
        if (other.parked)
            throw Fault{__builtin_ctz(lanes),
                        "returns while other lanes of its warp wait for it at PTX line " +
                            std::to_string(warp.kernel->code[other.pc].line)};
    warp.live &= ~lanes;
    Group& group = warp.groups[warp.current];
    group.lanes &= ~lanes;
    ++group.pc;
    if (group.lanes == 0)
        warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(warp.current));
}

// Lanes of the current group for which the guard of the instruction holds.
inline uint32_t guarded_lanes(const Warp& warp, const Instruction& i, uint32_t lanes) {
    if (!i.guarded)
        return lanes;
    if (lanes & ~warp.state[i.guard_number].defined)
        undefined(warp, i.guard_number, lanes);
    const uint32_t holds = warp.predicate(i.guard);
    return lanes & (i.guard_negated ? ~holds : holds);
}

// A warp that has executed so many is taken for one that never ends.
constexpr uint32_t kMostInstructions = 50'000'000;

Stop run_warp(Warp& warp, uint32_t turn) {
    if (warp.executed > kMostInstructions)
        throw Fault{-1, "does not end: " + std::to_string(warp.executed) + " instructions"};
    const std::vector<Instruction>& code = warp.kernel->code;
    for (; turn; --turn) {
        Group* group = &warp.groups[warp.current];
        if (group->pc >= code.size())
            throw Fault{-1, "runs past the end of the kernel"};
        const Instruction& i = code[group->pc];
        const uint32_t lanes = guarded_lanes(warp, i, group->lanes);
        bool regroup = warp.groups.size() > 1;
        ++warp.executed;
        switch (i.flow) {
        case Flow::next:
            if (lanes)
                execute(warp, i, lanes);
            ++group->pc;
            break;
        case Flow::branch:
            if (lanes == group->lanes) {
                group->pc = i.target;
            } else if (lanes) {
                group->lanes &= ~lanes;
                ++group->pc;
                warp.groups.push_back({i.target, lanes, false});
                regroup = true;
            } else {
                ++group->pc;
            }
            break;
        case Flow::exit:
            if (lanes) {
                leave(warp, lanes);
                if (warp.groups.empty())
                    return Stop::returned;
                regroup = true;
            } else {
                ++group->pc;
            }
            break;
        case Flow::collective:
        case Flow::barrier:
            if (lanes == 0) {
                ++group->pc;
                break;
            }
            if (lanes != group->lanes)
                throw Fault{__builtin_ctz(group->lanes & ~lanes),
                            "an instruction of the whole warp, which this lane skips"};
            if (lanes != warp.live) {
                group->parked = true;
                if (!choose_group(warp))
                    throw Fault{__builtin_ctz(warp.live & ~lanes),
                                "an instruction of the whole warp, which has diverged: this lane "
                                "is elsewhere"};
                continue;
            }
            execute(warp, i, lanes);
            ++group->pc;
            if (i.flow == Flow::barrier) {
                warp.at_barrier = true;
                return Stop::waits;
            }
            break;
        }
        if (regroup && !choose_group(warp))
            throw Fault{-1, "lanes wait for each other at different instructions"};
    }
    return Stop::turn_over;
}

class Runner {
  public:
    Runner(const Program& program, const Kernel& kernel, const Launch& launch)
        : program_(program), kernel_(kernel), launch_(launch), global_([&] {
              std::vector<Allocation> all = launch.allocations;
              for (const auto& g : program.globals)
                  all.push_back({reinterpret_cast<uint64_t>(g->storage.data()), g->storage.size(),
                                 false, g->name});
              return all;
          }()),
          races_(global_) {
        threads_ = launch.block[0] * launch.block[1] * launch.block[2];
        cta_.launch = &launch_;
        cta_.kernel = &kernel_;
        cta_.global = &global_;
        cta_.races = &races_;
        cta_.traffic.resize(global_.size());
        cta_.random.seed(launch.seed);
        cta_.warps.resize((threads_ + kLanes - 1) / kLanes);
    }

    Counters run() {
        std::vector<uint64_t> order(static_cast<size_t>(launch_.grid[0]) * launch_.grid[1] *
                                    launch_.grid[2]);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), cta_.random);
        for (uint64_t index : order) {
            cta_.number = static_cast<uint32_t>(index);
            cta_.id[0] = static_cast<uint32_t>(index % launch_.grid[0]);
            cta_.id[1] = static_cast<uint32_t>(index / launch_.grid[0] % launch_.grid[1]);
            cta_.id[2] = static_cast<uint32_t>(index / launch_.grid[0] / launch_.grid[1]);
            run_cta();
        }
        for (size_t k = 0; k < global_.size(); ++k) {
            Traffic& sum = cta_.counters.traffic[global_[k].name];
            sum.read += cta_.traffic[k].read;
            sum.written += cta_.traffic[k].written;
        }
        cta_.counters.effective.insert(cta_.needs.lines().begin(), cta_.needs.lines().end());
        cta_.counters.exact_waits = cta_.needs.exact_waits();
        return cta_.counters;
    }

  private:
    void start(Warp& warp, int index) {
        const size_t words = kernel_.register_words, count = kernel_.register_names.size();
        std::vector<LaneBlock> storage = std::move(warp.storage);
        std::vector<RegisterState> state = std::move(warp.state);
        warp = Warp();
        warp.cta = &cta_;
        warp.kernel = &kernel_;
        warp.index = index;
        storage.resize((words + kLanes - 1) / kLanes);
        state.assign(count, {0, 0});
        warp.storage = std::move(storage);
        warp.state = std::move(state);
        warp.values = reinterpret_cast<uint32_t*>(warp.storage.data());
        warp.pinned.assign(count, 0);
        warp.product_access.assign(count, {0, 0});
        warp.result_of.assign(launch_.explain ? count : 0, 0);
        warp.fragment_of.assign(launch_.explain ? count : 0, 0);
        const uint32_t first = static_cast<uint32_t>(index) * kLanes;
        const uint32_t lanes = std::min<uint32_t>(kLanes, threads_ - first);
        warp.live = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
        warp.in_order = launch_.overlaps ? 0 : kAllLanes;
        warp.groups.push_back({0, warp.live, false});
        warp.local.assign(static_cast<size_t>(kLanes) * kernel_.local_bytes, 0xFF);
        warp.segment = cta_.shared.new_segment(index);
        for (const InitialRegister& r : kernel_.initial)
            initialize(warp, r, first);
    }

    void initialize(Warp& warp, const InitialRegister& r, uint32_t first) {
        using Kind = InitialRegister::Kind;
        warp.state[r.number].defined = kAllLanes;
        if (r.width == Width::predicate) {
            warp.values[r.place] = static_cast<uint32_t>(r.value);
            return;
        }
        for (uint32_t lane = 0; lane < kLanes; ++lane) {
            const uint32_t thread = first + lane;
            uint64_t value = r.value;
            if (r.kind == Kind::tid_x)
                value = thread % launch_.block[0];
            else if (r.kind == Kind::tid_y)
                value = thread / launch_.block[0] % launch_.block[1];
            else if (r.kind == Kind::tid_z)
                value = thread / launch_.block[0] / launch_.block[1];
            else if (r.kind != Kind::constant)
                value = cta_.id[static_cast<int>(r.kind) - static_cast<int>(Kind::ctaid_x)];
            if (r.width == Width::bits64)
                reinterpret_cast<uint64_t*>(warp.values + r.place)[lane] = value;
            else
                warp.values[r.place + lane] = static_cast<uint32_t>(value);
        }
    }

    void run_cta() {
        cta_.shared.reset(kernel_.info.static_shared_bytes + launch_.dynamic_shared_bytes,
                          cta_.warps.size(), launch_.explain);
        races_.start_cta(cta_.number);
        barrier_lines_.clear();
        std::vector<Warp*> ready;
        for (size_t k = 0; k < cta_.warps.size(); ++k) {
            start(cta_.warps[k], static_cast<int>(k));
            ready.push_back(&cta_.warps[k]);
        }
        size_t left = ready.size();
        while (left) {
            if (ready.empty()) {
                release_barrier(ready);
                continue;
            }
            const uint64_t draw = cta_.random();
            const size_t pick = static_cast<size_t>((draw & 0xFFFF) % ready.size());
            // Mostly a few instructions, at times many: both small and large overlaps occur.
            const uint32_t turn = static_cast<uint32_t>(draw >> 16 & 3 ? 1 + (draw >> 20 & 31)
                                                                       : 1 + (draw >> 20 & 1023));
            const Stop stop = guarded_run(*ready[pick], turn);
            if (stop == Stop::turn_over)
                continue;
            left -= stop == Stop::returned;
            ready[pick] = ready.back();
            ready.pop_back();
        }
        try {
            check_warpgroups(cta_);
        } catch (const Fault& fault) {
            throw ExecutionError(fault.what + " in " + kernel_.info.name + ", CTA " +
                                 join(cta_.id));
        }
        for (const Warp& warp : cta_.warps)
            cta_.counters.instructions += warp.executed;
        cta_.needs.forget();
        for (const auto& [barrier, line] : barrier_lines_)
            if (cta_.shared.needed(barrier))
                cta_.counters.effective.insert(line);
    }

    void release_barrier(std::vector<Warp*>& ready) {
        const Warp* first = nullptr;
        for (Warp& warp : cta_.warps) {
            if (!warp.at_barrier)
                continue;
            if (first && warp.barrier != first->barrier)
                report(warp, {-1, "deadlock: waits at barrier " + std::to_string(warp.barrier) +
                                      ", while warp " + std::to_string(first->index) +
                                      " waits at barrier " + std::to_string(first->barrier)});
            first = &warp;
        }
        for (Warp& warp : cta_.warps)
            if (warp.at_barrier) {
                warp.at_barrier = false;
                ready.push_back(&warp);
            }
        cta_.shared.barrier(cta_.warps);
        ++cta_.counters.block_barriers;
        if (launch_.explain)
            for (const Warp& warp : cta_.warps)
                if (!warp.groups.empty())
                    barrier_lines_.emplace_back(cta_.shared.barriers(), warp.barrier_line);
    }

    Stop guarded_run(Warp& warp, uint32_t turn) {
        try {
            return run_warp(warp, turn);
        } catch (const Fault& fault) {
            report(warp, fault);
        }
    }

    // PTX line 812, forward.cuh:51: kernel forward, CTA (0, 1, 0), warp 2, lane 5: reads ...
    [[noreturn]] void report(const Warp& warp, const Fault& fault) const {
        std::string text;
        if (warp.current < warp.groups.size()) {
            const uint32_t pc = warp.groups[warp.current].pc;
            if (pc < kernel_.code.size()) {
                const Instruction& i = kernel_.code[pc];
                text = "PTX line " + std::to_string(i.line);
                if (i.source.file && i.source.file < program_.files.size()) {
                    const std::string& path = program_.files[i.source.file];
                    text += ", " + path.substr(path.find_last_of('/') + 1) + ":" +
                            std::to_string(i.source.line);
                }
                text += ", ";
            }
        }
        text += "kernel " + kernel_.info.name + ", CTA " + join(cta_.id) + ", warp " +
                std::to_string(warp.index);
        if (fault.lane >= 0)
            text += ", lane " + std::to_string(fault.lane);
        text += ": " + fault.what;
        if (warp.current < warp.groups.size() &&
            warp.groups[warp.current].pc < kernel_.code.size()) {
            const std::string& line =
                program_.lines[kernel_.code[warp.groups[warp.current].pc].line - 1];
            const size_t start = line.find_first_not_of(" \t");
            text += "\n    " + line.substr(start == std::string::npos ? 0 : start, 160);
        }
        throw ExecutionError(text);
    }

    const Program& program_;
    const Kernel& kernel_;
    const Launch& launch_;
    AllocationTable global_;
    GlobalRaces races_;
    uint32_t threads_ = 0;
    Cta cta_;
    std::vector<std::pair<uint32_t, uint32_t>> barrier_lines_;  // number of a barrier, PTX line
};

}  // namespace

Counters run(const Program& program, const Kernel& kernel, const Launch& launch) {
    return Runner(program, kernel, launch).run();
}

}  // namespace ptx
