// A SIMT emulator: runs a CUDA kernel's source on the CPU, one fiber per thread, one block after
// another.
//
// Barriers and warp collectives are rendezvous, scheduling is seeded, shared memory starts as NaN,
// an asynchronous copy poisons its target at issue and delivers at its wait, and every access is
// checked against the launch's buffers and the block's shared arrays. Under AddressSanitizer red
// zones separate the shared arrays; under ThreadSanitizer each fiber is a thread of its own, so
// that a missing barrier is reported as a race whatever the schedule was. It models neither time
// nor the memory order of real hardware.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace simt {

// Where a primitive was called; kernels pass it by default arguments.
struct Site {
    const char* file;
    int line;
};

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Schedule : int { random, warp_priority, ascending, descending };

struct Options {
    Schedule schedule = Schedule::random;
    uint64_t seed = 1;
};

// What the launches since the last reset did.
struct Counters {
    uint64_t launches, global_read_bytes, global_write_bytes, async_copy_bytes, multiply_adds,
        matrix_loads, bank_conflicts, block_barriers;
};

// A piece of global memory that a launch may touch.
struct Buffer {
    const char* name;
    const void* data;
    size_t bytes;
    bool writable;
};

struct Launch {
    const char* name;
    int grid_x, grid_y;
    int threads;
    int shared_bytes;
    std::vector<Buffer> buffers;
};

// Runs `kernel(params)` in every thread of the grid.
//
// Raises Error with the kernel's file and line, block, thread and lane where the kernel breaks a
// rule. One launch runs at a time in a process; others wait.
void launch(const Launch& launch, void (*kernel)(const void* params), const void* params);

void set_options(const Options& options);
Counters counters();
void reset_counters();

// --- Called by kernels, through cuda/kernels/prim_host.h
// -------------------------------------------------------------------

int thread_index();
int block_x();
int block_y();
void block_sync(Site site);
void warp_sync(Site site);
unsigned char* shared_array(int offset, int bytes, Site site);
void check_global(const void* address, size_t bytes, bool write, Site site);
void check_shared(const void* address, size_t bytes, Site site);
void copy_async(void* target, const void* source, bool valid, Site site);
void copy_commit();
void copy_wait(int pending, Site site);
void load_matrices(uint32_t (&m)[4], const void* row, bool transposed, Site site);

enum class Format : int { bf16, fp16 };
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Format format,
                  Site site);
float to_float(uint16_t bits, Format format);
uint16_t from_float(float value, Format format);

}  // namespace simt
