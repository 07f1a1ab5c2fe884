#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;

}  // namespace

#if defined(SIMT_X86_64)
// Saves the callee-saved registers on the current stack and resumes another one. glibc's
// swapcontext costs a system call for the signal mask on top, 20 times the time.
extern "C" void simt_swap_stack(void** save, void* resume);
asm(R"(
.text
.type simt_swap_stack, @function
simt_swap_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.type simt_first_entry, @function
simt_first_entry:
    movq %r12, %rdi
    callq *%r13
    ud2
)");
extern "C" void simt_first_entry();
#endif

Fiber::~Fiber() {
#if defined(SIMT_TSAN)
    if (mapping_)
        __tsan_destroy_fiber(sanitizer_fiber_);
#endif
    if (mapping_) {
#if defined(SIMT_ASAN)
        __asan_unpoison_memory_region(stack_bottom_, stack_size_);
#endif
        munmap(mapping_, kStackBytes + kGuardBytes);
    }
}

void Fiber::start(void (*entry)(void*), void* argument) {
    if (!mapping_) {
        void* mapping = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapping == MAP_FAILED)
            throw std::bad_alloc();
        mapping_ = static_cast<char*>(mapping);
        mprotect(mapping_, kGuardBytes, PROT_NONE);
        stack_bottom_ = mapping_ + kGuardBytes;
        stack_size_ = kStackBytes;
#if defined(SIMT_TSAN)
        sanitizer_fiber_ = __tsan_create_fiber(0);
#endif
    }
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(stack_bottom_, stack_size_);
#endif
    fake_stack_ = nullptr;
#if defined(SIMT_X86_64)
    // Staggered tops keep the hot ends of many stacks out of the same cache sets.
    const size_t stagger = (reinterpret_cast<uintptr_t>(this) >> 6) % 64 * 64;
    auto* top = reinterpret_cast<void**>(mapping_ + kGuardBytes + kStackBytes - 256 - stagger);
    void** frame = top - 9;         // leaves the stack 16-byte aligned for the call
    frame[0] = frame[1] = nullptr;  // r15, r14
    frame[2] = reinterpret_cast<void*>(entry);
    frame[3] = argument;
    frame[4] = frame[5] = nullptr;  // rbx, rbp
    frame[6] = reinterpret_cast<void*>(&simt_first_entry);
    stack_pointer_ = frame;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = mapping_ + kGuardBytes;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    const auto target = reinterpret_cast<uintptr_t>(entry);
    const auto value = reinterpret_cast<uintptr_t>(argument);
    // makecontext passes ints, so that both pointers travel in halves.
    void (*trampoline)(unsigned, unsigned, unsigned, unsigned) = [](unsigned t0, unsigned t1,
                                                                    unsigned v0, unsigned v1) {
        const auto join = [](unsigned low, unsigned high) {
            return static_cast<uintptr_t>(static_cast<uint64_t>(high) << 32 | low);
        };
        reinterpret_cast<void (*)(void*)>(join(t0, t1))(reinterpret_cast<void*>(join(v0, v1)));
    };
    makecontext(
        &context_, reinterpret_cast<void (*)()>(trampoline), 4, static_cast<unsigned>(target),
        static_cast<unsigned>(static_cast<uint64_t>(target) >> 32), static_cast<unsigned>(value),
        static_cast<unsigned>(static_cast<uint64_t>(value) >> 32));
#endif
}

void Fiber::adopt() {
#if defined(SIMT_TSAN)
    sanitizer_fiber_ = __tsan_get_current_fiber();
#endif
}

void Fiber::switch_to(Fiber& current, Fiber& next, bool final) {
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(final ? nullptr : &current.fake_stack_, next.stack_bottom_,
                                   next.stack_size_);
#else
    (void) final;
#endif
#if defined(SIMT_TSAN)
    // The flag: a switch is no synchronization, or no race between fibers would ever be seen.
    __tsan_switch_to_fiber(next.sanitizer_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_X86_64)
    simt_swap_stack(&current.stack_pointer_, next.stack_pointer_);
#else
    swapcontext(&current.context_, &next.context_);
#endif
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(current.fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered(Fiber& self, Fiber& caller) {
#if defined(SIMT_ASAN)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(self.fake_stack_, &bottom, &size);
    if (!caller.mapping_) {
        caller.stack_bottom_ = bottom;
        caller.stack_size_ = size;
    }
#else
    (void)self;
    (void)caller;
#endif
}

}  // namespace simt
