// The threads of one call.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/isa/scratch.h"

namespace afa::cpu::AFA_ISA {

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

    // This thread's cell of a grid: some of the rows, with all their columns or, where there are
    // more threads than rows, with some of them.
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
        Layout layout;
        const Piece<int64_t> counter = layout.reserve<int64_t>(phases);
        const Scratch memory(layout);
        int64_t* counters = memory[counter];
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
