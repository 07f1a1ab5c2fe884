// Guards the emulator itself: small kernels, each with one fault, of which every build must notice
// what it claims to.
//
//   hazards
//
// Each kernel runs in a child process: a sanitizer ends it. The sound twin of each kernel must pass
// in every build. Exit status: 0 all right, 1 otherwise.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "cuda/kernels/prim.cuh"

#if defined(SIMT_ASAN)
extern "C" const char* __asan_default_options() {
    return "detect_stack_use_after_return=0:detect_leaks=0";
}
#endif

namespace {

using namespace afa;

constexpr int kThreads = 128;
constexpr int kSharedBytes = 4096;

struct Params {
    const float* in;  // [kThreads]
    float* out;       // [kThreads]
    bool fault;
};

void exchange_in_block(const Params& p) {
    SharedMemory shared;
    float* values = shared.take<float>(kThreads);
    const int t = thread_index();
    store_shared(values + t, load_global(p.in + t));
    if (!p.fault)
        block_sync();
    store_global(p.out + t, load_shared<float>(values + (t + 64) % kThreads));
}

void exchange_in_warp(const Params& p) {
    SharedMemory shared;
    float* values = shared.take<float>(kThreads);
    const int t = thread_index();
    store_shared(values + t, load_global(p.in + t));
    if (!p.fault)
        warp_sync();
    store_global(p.out + t, load_shared<float>(values + (t ^ 1)));
}

void copy_without_wait(const Params& p) {
    SharedMemory shared;
    float* values = shared.take<float>(kThreads);
    const int t = thread_index();
    if (t < kThreads / 4)
        copy_async(values + t * 4, p.in + t * 4, true);
    copy_commit();
    if (p.fault)
        copy_wait<1>();
    else
        copy_wait<0>();
    block_sync();
    store_global(p.out + t, load_shared<float>(values + t));
    copy_wait<0>();
}

void refill_while_read(const Params& p) {
    SharedMemory shared;
    float* values = shared.take<float>(kThreads);
    const int t = thread_index();
    store_shared(values + t, load_global(p.in + t));
    block_sync();
    const float value = load_shared<float>(values + (t + 64) % kThreads);
    if (!p.fault)
        block_sync();
    if (t < kThreads / 4)
        copy_async(values + t * 4, p.in, true);
    copy_commit();
    store_global(p.out + t, value);
    copy_wait<0>();
}

void ends_with_copies(const Params& p) {
    SharedMemory shared;
    float* values = shared.take<float>(kThreads);
    if (thread_index() < kThreads / 4)
        copy_async(values + thread_index() * 4, p.in, true);
    copy_commit();
    if (!p.fault)
        copy_wait<0>();
    store_global(p.out + thread_index(), 1.0f);
}

void reads_beyond_buffer(const Params& p) {
    store_global(p.out + thread_index(), load_global(p.in + thread_index() + (p.fault ? 1 : 0)));
}

void writes_beyond_buffer(const Params& p) {
    store_global(p.out + thread_index() + (p.fault ? 1 : 0), 1.0f);
}

void writes_input(const Params& p) {
    store_global((p.fault ? const_cast<float*>(p.in) : p.out) + thread_index(), 1.0f);
}

void misaligned_vector(const Params& p) {
    const Vec16 v = load_global(reinterpret_cast<const Vec16*>(p.in + (p.fault ? 1 : 0)));
    store_global(p.out + thread_index(), static_cast<float>(v.word[0] != 0));
}

// A pair of 16-bit elements, as z is read.
void misaligned_pair(const Params& p) {
    const auto* halves = reinterpret_cast<const uint16_t*>(p.in) + (p.fault ? 1 : 0);
    const uint32_t pair = load_global(reinterpret_cast<const uint32_t*>(halves));
    store_global(p.out + thread_index(), static_cast<float>(pair != 0));
}

void beyond_shared_array(const Params& p) {
    SharedMemory shared;
    float* values = shared.take<float>(kThreads);
    store_shared(values + thread_index() + (p.fault ? 1 : 0), 1.0f);
    store_global(p.out + thread_index(), 1.0f);
}

void takes_too_much(const Params& p) {
    SharedMemory shared;
    shared.take<float>(p.fault ? kSharedBytes : 4);
    store_global(p.out + thread_index(), 1.0f);
}

void barrier_of_some(const Params& p) {
    if (!p.fault || thread_index() < 64)
        block_sync();
    store_global(p.out + thread_index(), 1.0f);
}

void half_warp_collective(const Params& p) {
    if (!p.fault || (thread_index() & 16) == 0)
        warp_sync();
    store_global(p.out + thread_index(), 1.0f);
}

void divergent_collectives(const Params& p) {
    if (p.fault && (thread_index() & 16))
        warp_sync();
    else
        warp_sync();
    store_global(p.out + thread_index(), 1.0f);
}

// Two blocks: each adds to what the other one adds to.
void blocks_share_output(const Params& p) {
    float* out =
        p.out + (p.fault ? thread_index() / 2 : (block_x() * kThreads + thread_index()) / 2);
    if (thread_index() % 2 == 0)
        store_global(out, load_global(out) + 1.0f);
}

enum Build : int { plain = 1, address = 2, thread = 4, any = 7 };
#if defined(SIMT_ASAN)
constexpr Build kBuild = address;
#elif defined(SIMT_TSAN)
constexpr Build kBuild = thread;
#else
constexpr Build kBuild = plain;
#endif

struct Hazard {
    const char* name;
    void (*kernel)(const Params&);
    int noticed_by;
    int blocks = 1;
};

#define HAZARD(kernel, ...) {#kernel, kernel, __VA_ARGS__}
const Hazard kHazards[] = {
    HAZARD(exchange_in_block, any),     HAZARD(exchange_in_warp, any),
    HAZARD(copy_without_wait, any),     HAZARD(refill_while_read, thread),
    HAZARD(ends_with_copies, any),      HAZARD(reads_beyond_buffer, any),
    HAZARD(writes_beyond_buffer, any),  HAZARD(writes_input, any),
    HAZARD(misaligned_vector, any),     HAZARD(misaligned_pair, any),
    HAZARD(beyond_shared_array, any),   HAZARD(takes_too_much, any),
    HAZARD(barrier_of_some, any),       HAZARD(half_warp_collective, any),
    HAZARD(divergent_collectives, any), HAZARD(blocks_share_output, thread, 2),
};

// In a child: whether the launch failed or left something that is not a number.
int run(const Hazard& hazard, bool fault) {
    float in[kThreads + 4], out[kThreads + 4];
    for (int i = 0; i < kThreads + 4; ++i)
        in[i] = out[i] = static_cast<float>(i);
    const Params params{in, out, fault};
    const simt::Launch launch{hazard.name,
                              hazard.blocks,
                              1,
                              kThreads,
                              kSharedBytes,
                              {{"in", in, kThreads * 4, false}, {"out", out, kThreads * 4, true}}};
    static const Hazard* current;
    current = &hazard;
    try {
        simt::launch(
            launch, [](const void* p) { current->kernel(*static_cast<const Params*>(p)); },
            &params);
    } catch (const simt::Error&) {
        return 1;
    }
    for (int i = 0; i < kThreads; ++i)
        if (std::isnan(out[i]))
            return 1;
    return 0;
}

bool is_noticed(const Hazard& hazard, bool fault) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        std::freopen("/dev/null", "w", stderr);  // the sanitizer's report
        _exit(run(hazard, fault));
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status != 0;
}

}  // namespace

int main() {
    int wrong = 0, expected = 0;
    for (const Hazard& hazard : kHazards) {
        if (is_noticed(hazard, false)) {
            std::printf("FAILED %s: its sound twin is reported\n", hazard.name);
            ++wrong;
        }
        if (!(hazard.noticed_by & kBuild))
            continue;
        ++expected;
        if (!is_noticed(hazard, true)) {
            std::printf("FAILED %s: not noticed\n", hazard.name);
            ++wrong;
        }
    }
    if (wrong == 0)
        std::printf("hazards: %d of %d noticed, no sound kernel reported\n", expected, expected);
    return wrong != 0;
}
