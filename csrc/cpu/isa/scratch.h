// The memory that a call takes for itself.
#pragma once

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/isa/vec.h"

namespace afa::cpu::AFA_ISA {

// Where an array of T begins within a Scratch.
template <class T>
struct Piece {
    int64_t offset = 0;
};

// The arrays of one Scratch, each aligned to a cache line.
class Layout {
  public:
    static constexpr int64_t kAlignment = 64;

    template <class T>
    Piece<T> reserve(int64_t count) {
        const Piece<T> piece{bytes_};
        bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
        return piece;
    }
    int64_t bytes() const { return bytes_; }

  private:
    int64_t bytes_ = 0;
};

// The memory of a Layout, in one allocation.
class Scratch {
  public:
    explicit Scratch(const Layout& layout)
        : memory_(static_cast<char*>(aligned_alloc(
              Layout::kAlignment, layout.bytes() > 0 ? layout.bytes() : Layout::kAlignment))) {
        if (memory_ == nullptr)
            throw std::bad_alloc();
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(memory_); }

    template <class T>
    T* operator[](Piece<T> piece) const {
        return reinterpret_cast<T*>(memory_ + piece.offset);
    }

  private:
    char* memory_;
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

}  // namespace afa::cpu::AFA_ISA
