// Memory and threads of one call.
#pragma once

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/isa/vec.h"

namespace afa::cpu::AFA_ISA {

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kWorthThreads = 200000;

// One allocation, cut into aligned pieces: reserve() all of them, allocate(), then get() each by
// its offset.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(memory_); }

    int64_t reserve(int64_t bytes) {
        const int64_t offset = size_;
        size_ += round_up(bytes, kAlignment);
        return offset;
    }
    void allocate() {
        memory_ = static_cast<char*>(aligned_alloc(kAlignment, size_ > 0 ? size_ : kAlignment));
        if (memory_ == nullptr)
            throw std::bad_alloc();
    }
    template <class T>
    T* get(int64_t offset) const {
        return reinterpret_cast<T*>(memory_ + offset);
    }

  private:
    static constexpr int64_t kAlignment = 64;
    char* memory_ = nullptr;
    int64_t size_ = 0;
};

// Asks for huge pages under a large result before its first touch: faulting 16 MB in by 4 KB pages
// took longer (7 ms) than the whole backward of a 2048 x 2048 layer at r = 16 (5 ms).
static inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kHugePage = int64_t{2} << 20;
    const int64_t address = reinterpret_cast<int64_t>(data);
    const int64_t begin = round_up(address, kHugePage),
                  end = (address + bytes) / kHugePage * kHugePage;
    if (end - begin >= 2 * kHugePage)
        madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

struct Range {
    int64_t begin, end;
};

// The rows and columns of a grid that one thread takes.
struct Cell {
    Range rows, cols;
};

// The run of [0, count) of one thread of a team.
static inline Range part_of_team(int64_t count, int64_t id, int64_t threads) {
    return {count * id / threads, count * (id + 1) / threads};
}

// The threads of one parallel region. They share out tasks in index order; what a task computes
// depends on its index alone, so results do not depend on which thread takes it or on how many
// threads there are.
class Team {
  public:
    Team(int id, int threads, int64_t* counters)
        : id_(id), threads_(threads), counters_(counters) {}

    int id() const { return id_; }

    void barrier() const {
#if defined(_OPENMP)
        if (threads_ > 1) {
#pragma omp barrier
        }
#endif
    }

    // Runs f(0) .. f(count - 1), each once. Every thread calls it with the same arguments in the
    // same order.
    template <class F>
    void share(int64_t count, F&& f) {
        int64_t* counter = counters_ + phase_++;
        if (threads_ == 1) {
            for (int64_t i = 0; i < count; ++i)
                f(i);
            return;
        }
        for (int64_t i; (i = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)) < count;)
            f(i);
    }

    // This thread's run of [0, count).
    Range part(int64_t count) const { return part_of_team(count, id_, threads_); }

    // Runs f on this thread's run of [0, count).
    template <class F>
    void split(int64_t count, F&& f) const {
        const Range run = part(count);
        for (int64_t i = run.begin; i < run.end; ++i)
            f(i);
    }

    // This thread's rows of a grid, and all their columns as long as there are rows for everyone.
    Cell grid(int64_t rows, int64_t cols) const {
        const int across = static_cast<int>(ceil_div(threads_, rows)), down = threads_ / across;
        if (id_ >= down * across)
            return {{0, 0}, {0, 0}};
        return {part_of_team(rows, id_ / across, down), part_of_team(cols, id_ % across, across)};
    }

  private:
    int id_, threads_;
    int64_t* counters_;
    int64_t phase_ = 0;
};

// Calls f(team) on up to `threads` threads; `phases` bounds the calls of Team::share. Nothing in f
// may throw.
template <class F>
static void run_team(int threads, int64_t phases, F&& f) {
#if defined(_OPENMP)
    if (threads > 1) {
        Scratch memory;
        memory.reserve(phases * static_cast<int64_t>(sizeof(int64_t)));
        memory.allocate();
        int64_t* counters = memory.get<int64_t>(0);
        memset(counters, 0, phases * sizeof(int64_t));
#pragma omp parallel num_threads(threads)
        f(Team(omp_get_thread_num(), omp_get_num_threads(), counters));
        return;
    }
#endif
    (void)phases;
    f(Team(0, 1, nullptr));
}

}  // namespace afa::cpu::AFA_ISA
