// The scheduler of the emulator: fibers, barriers, rendezvous, failures.
#include "emulator/simt.h"

#include <cstdio>
#include <cstring>
#include <mutex>

#include "emulator/block.h"

namespace simt {

Block block;
Options options;
Counters counts;

namespace {

uint64_t random_state = 1;
std::mutex one_launch;

void seed_random(uint64_t seed) { random_state = seed * 2 + 1; }

int lowest(uint32_t mask) { return __builtin_ctz(mask); }
int highest(uint32_t mask) { return 31 - __builtin_clz(mask); }

int random_bit(uint32_t mask) {
    const uint32_t turn = random_below(kWarp);
    const uint32_t turned = (mask >> turn) | (mask << (kWarp - turn) % kWarp);
    return (lowest(turned) + turn) % kWarp;
}

// The next thread to run, or null if none can.
Thread* pick() {
    const int warps = static_cast<int>(block.warps.size());
    const int start = options.schedule == Schedule::random ? random_below(warps) : 0;
    for (int i = 0; i < warps; ++i) {
        int w = i;
        if (options.schedule == Schedule::random)
            w = (start + i) % warps;
        else if (options.schedule == Schedule::warp_priority)
            w = block.warp_order[i];
        else if (options.schedule == Schedule::descending)
            w = warps - 1 - i;
        Warp& warp = block.warps[w];
        if (!warp.ready)
            continue;
        int lane;
        if (options.schedule == Schedule::ascending)
            lane = lowest(warp.ready);
        else if (options.schedule == Schedule::descending)
            lane = highest(warp.ready);
        else
            lane = random_bit(warp.ready);
        warp.ready &= ~(1u << lane);
        return block.threads[w * kWarp + lane].get();
    }
    return nullptr;
}

const char* base_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// One line per warp: what its threads wait for.
[[noreturn]] void report_deadlock() {
    char lines[400];
    size_t used = 0;
    lines[0] = '\0';
    for (size_t w = 0; w < block.warps.size() && used + 1 < sizeof(lines); ++w) {
        int done = 0;
        const Thread* sample = nullptr;
        for (int lane = 0; lane < kWarp; ++lane) {
            const Thread& thread = *block.threads[w * kWarp + lane];
            done += thread.done;
            if (!thread.done)
                sample = &thread;
        }
        const int written =
            sample
                ? std::snprintf(lines + used, sizeof(lines) - used,
                                "; warp %zu: %d threads wait, one at %s:%d for %s", w, kWarp - done,
                                base_name(sample->site.file), sample->site.line, sample->waits_for)
                : std::snprintf(lines + used, sizeof(lines) - used, "; warp %zu: ended", w);
        used += static_cast<size_t>(written);
    }
    fail(block.current->site, "deadlock%s", lines);
}

void switch_to(Thread& next, bool final = false) {
    Thread& previous = *block.current;
    if (&next == &previous)
        return;
    block.current = &next;
    Fiber::switch_to(previous.fiber, next.fiber, final);
}

Fiber* entered_from;  // whose stack a new fiber is entered from

void run_thread(void* argument) {
    Thread& thread = *static_cast<Thread*>(argument);
    Fiber::entered(thread.fiber, *entered_from);
    entered_from = &thread.fiber;
    sanitizer_acquire(&block.launch_token);
    block.kernel(block.params);
    if (!thread.copies.empty())
        fail(thread.site, "the thread ends with asynchronous copies that were not waited for");
    thread.done = true;
    --block.alive;
    sanitizer_release(&block.end_token);
    if (block.alive == 0)
        Fiber::switch_to(thread.fiber, block.main, true);
    Thread* next = pick();
    if (!next)
        report_deadlock();
    switch_to(*next, true);
    __builtin_unreachable();
}

void run_block() {
    const int count = block.launch->threads;
    while (static_cast<int>(block.threads.size()) < count)
        block.threads.push_back(std::make_unique<Thread>());
    // For ThreadSanitizer a thread is ordered after the one of an earlier block that had its fiber.
    // Shuffled, that hides no race between blocks for long, unless it lies before a barrier of the
    // earlier block, and spares the making of fresh fibers.
    for (size_t i = block.threads.size() - 1; i > 0; --i)
        std::swap(block.threads[i], block.threads[random_below(static_cast<uint32_t>(i) + 1)]);
    block.warps.assign(count / kWarp, Warp{});
    block.warp_order.resize(block.warps.size());
    for (size_t w = 0; w < block.warps.size(); ++w) {
        block.warp_order[w] = static_cast<int>(w);
        std::swap(block.warp_order[w],
                  block.warp_order[random_below(static_cast<uint32_t>(w) + 1)]);
    }
    block.alive = count;
    block.at_barrier = 0;
    begin_shared_memory();
    sanitizer_release(&block.launch_token);
    for (int i = 0; i < count; ++i) {
        Thread& thread = *block.threads[i];
        thread.index = i;
        thread.done = false;
        thread.site = {block.launch->name, 0};
        thread.committed = 0;
        thread.copies.clear();
        thread.fiber.start(&run_thread, &thread);
        make_ready(thread);
    }
    block.current = pick();
    entered_from = &block.main;
    Fiber::switch_to(block.main, block.current->fiber);
    end_shared_memory();
}

}  // namespace

uint32_t random_below(uint32_t bound) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>((random_state >> 33) % bound);
}

void fail(Site site, const char* format, ...) {
    char what[480];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(what, sizeof(what), format, arguments);
    va_end(arguments);
    const int thread = block.current->index;
    std::snprintf(block.message, sizeof(block.message),
                  "%s: %s:%d: %s (block %d, %d, thread %d: warp %d, lane %d)", block.launch->name,
                  base_name(site.file), site.line, what, block.x, block.y, thread, thread / kWarp,
                  thread % kWarp);
    block.failed = true;
    Fiber::switch_to(block.current->fiber, block.main, true);
    __builtin_unreachable();
}

void suspend(const char* waits_for, Site site) {
    Thread& self = *block.current;
    if (waits_for) {
        self.waits_for = waits_for;
        self.site = site;
    }
    Thread* next = pick();
    if (!next)
        report_deadlock();
    entered_from = &self.fiber;
    switch_to(*next);
}

void block_sync(Site site) {
    ++counts.block_barriers;
    void* token = &block.barrier_token[block.barrier_generation & 1];
    sanitizer_release(token);
    if (++block.at_barrier < static_cast<int>(block.launch->threads)) {
        suspend("block_sync", site);
    } else {
        block.at_barrier = 0;
        ++block.barrier_generation;
        for (int i = 0; i < block.launch->threads; ++i)
            make_ready(*block.threads[i]);
        suspend(nullptr, site);  // it may or may not be the first to go on
    }
    sanitizer_acquire(token);
}

void collect(Collective collective, const LaneOperands& operands, Site site) {
    Thread& self = *block.current;
    Warp& warp = block.warps[self.index / kWarp];
    const int lane = self.index % kWarp;
    if (warp.arrived == 0) {
        warp.collective = collective;
        warp.site = site;
    } else if (warp.collective != collective || warp.site.line != site.line) {
        fail(site, "divergent warp collective: other lanes of the warp are at %s:%d",
             base_name(warp.site.file), warp.site.line);
    }
    warp.lane[lane] = operands;
    warp.arrived |= 1u << lane;
    if (warp.arrived != 0xFFFFFFFFu)
        return suspend("the other lanes of its warp", site);
    run_collective(warp);
    warp.arrived = 0;
    for (int i = 0; i < kWarp; ++i)
        make_ready(*block.threads[self.index - lane + i]);
    suspend(nullptr, site);
}

void warp_sync(Site site) {
    Warp& warp = block.warps[block.current->index / kWarp];
    void* token = &warp.sync_token[warp.generation & 1];
    sanitizer_release(token);
    collect(Collective::warp_sync, {}, site);
    sanitizer_acquire(token);
}

void launch(const Launch& launch, void (*kernel)(const void* params), const void* params) {
    std::lock_guard<std::mutex> guard(one_launch);
    if (launch.grid_x < 1 || launch.grid_y < 1 || launch.threads < kWarp || launch.threads > 1024 ||
        launch.threads % kWarp)
        throw Error(std::string(launch.name) + ": invalid grid or block size");
    ++counts.launches;
    seed_random(options.seed);
    block.launch = &launch;
    block.kernel = kernel;
    block.params = params;
    block.failed = false;
    block.main.adopt();
    const int blocks = launch.grid_x * launch.grid_y;
    // A multiplicative walk visits every block once in an order that depends on the seed.
    const int start = static_cast<int>(random_below(blocks));
    for (int i = 0; i < blocks && !block.failed; ++i) {
        const int index = options.schedule == Schedule::ascending    ? i
                          : options.schedule == Schedule::descending ? blocks - 1 - i
                                                                     : (start + i) % blocks;
        block.x = index % launch.grid_x;
        block.y = index / launch.grid_x;
        run_block();
    }
    sanitizer_acquire(&block.end_token);
    if (block.failed)
        throw Error(block.message);
}

void set_options(const Options& wanted) {
    std::lock_guard<std::mutex> guard(one_launch);
    options = wanted;
}

Counters counters() {
    std::lock_guard<std::mutex> guard(one_launch);
    return counts;
}

void reset_counters() {
    std::lock_guard<std::mutex> guard(one_launch);
    counts = {};
}

int thread_index() { return block.current->index; }
int block_x() { return block.x; }
int block_y() { return block.y; }

}  // namespace simt
