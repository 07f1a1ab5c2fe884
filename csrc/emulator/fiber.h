// Cooperative fibers with their own stacks, announced to AddressSanitizer and ThreadSanitizer.
//
// The emulator's own files are compiled without -fsanitize and call the sanitizers' interfaces by
// hand: SIMT_ASAN or SIMT_TSAN says which one the kernels were compiled with.
#pragma once

#include <cstddef>

// A stack switch of a dozen instructions where it is written, ucontext elsewhere (and on request).
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_X86_64
#else
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
  public:
    Fiber() = default;  // the fiber of the caller of run(): it has a stack already
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    ~Fiber();

    // Prepares a run of `entry(argument)` on a stack of its own. `entry` must not return: it ends
    // in a switch away.
    void start(void (*entry)(void*), void* argument);
    // Runs `next` until something switches back to `current`. `final`: `current` will never run
    // again.
    static void switch_to(Fiber& current, Fiber& next, bool final = false);
    // Must be the first call on a new fiber's stack.
    static void entered(Fiber& self, Fiber& caller);
    // Adopts the calling thread's stack (its sanitizer state) as this fiber.
    void adopt();

  private:
#if defined(SIMT_X86_64)
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
    char* mapping_ = nullptr;
    const void* stack_bottom_ = nullptr;
    size_t stack_size_ = 0;
    void* fake_stack_ = nullptr;
    void* sanitizer_fiber_ = nullptr;
};

}  // namespace simt
