// The state of the block that the emulator is running: shared by its scheduler (simt.cpp), its
// memory checks (memory.cpp) and its warp collectives (collectives.cpp).
#pragma once

#include <cstdarg>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/simt.h"

namespace simt {

constexpr int kWarp = 32;

struct PendingCopy {
    void* target;
    const void* source;  // null: zeros
    int group;
};

struct Thread {
    Fiber fiber;
    int index = 0;
    bool done = false;
    const char* waits_for = nullptr;  // null while it can run
    Site site{};
    int committed = 0;  // copy groups
    std::vector<PendingCopy> copies;
};

enum class Collective : int {
    none,
    warp_sync,
    load_matrices,
    load_matrices_transposed,
    multiply_add
};

// What a lane brings to a warp collective.
struct LaneOperands {
    uint32_t* matrices;
    const void* row;
    float* c;
    const uint32_t* a;
    uint32_t b[2];
    Format format;
};

struct Warp {
    uint32_t ready = 0;    // lanes that can run
    uint32_t arrived = 0;  // lanes at the collective
    Collective collective = Collective::none;
    Site site{};
    LaneOperands lane[kWarp];
    int generation = 0;
    char sync_token[2];  // alternating: a late lane must not acquire what a fast one releases at
                         // its next warp_sync
};

struct SharedArray {
    int offset;
    unsigned char* data;
    int bytes;
};

struct Block {
    const Launch* launch = nullptr;
    void (*kernel)(const void*) = nullptr;
    const void* params = nullptr;
    int x = 0, y = 0;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::vector<int> warp_order;  // Schedule::warp_priority
    int alive = 0, at_barrier = 0, barrier_generation = 0;
    char barrier_token[2], launch_token, end_token;
    std::vector<SharedArray> shared;
    unsigned char* shared_memory = nullptr;
    size_t shared_capacity = 0;
    size_t last_buffer = 0;
    Thread* current = nullptr;
    Fiber main;
    bool failed = false;
    char message[640];
};

extern Block block;
extern Options options;
extern Counters counts;

uint32_t random_below(uint32_t bound);

// Ends the launch with a message; does not return to the kernel.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Lets the other threads run until this one is ready again.
void suspend(const char* waits_for, Site site);
inline void make_ready(Thread& thread) {
    thread.waits_for = nullptr;
    block.warps[thread.index / kWarp].ready |= 1u << thread.index % kWarp;
}
// Gathers all lanes of the warp; the last to arrive runs the operation for all.
void collect(Collective collective, const LaneOperands& operands, Site site);
void run_collective(Warp& warp);

void begin_shared_memory();
void end_shared_memory();

void sanitizer_read(const void* address, size_t bytes);
void sanitizer_write(void* address, size_t bytes);
void sanitizer_acquire(void* token);
void sanitizer_release(void* token);

}  // namespace simt
