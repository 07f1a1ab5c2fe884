// What a static libstdc++ takes from a newer glibc than the one that a portable wheel is for
// (tools/portable_wheel.py). Hidden, so that nobody else sees these.
#include <sys/random.h>

#include <cstdint>
#include <cstdlib>

extern "C" {

// Since 2.32: whether the process has one thread, so that reference counts need no atomics. It has
// more.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// Since 2.36: behind std::random_device, which nothing here uses.
__attribute__((visibility("hidden"))) uint32_t arc4random() {
    uint32_t value;
    if (getrandom(&value, sizeof value, 0) != sizeof value)
        abort();
    return value;
}
}
