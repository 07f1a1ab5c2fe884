// Memory of the emulated block: checks of every access, shared arrays with red zones, asynchronous
// copies.
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "emulator/block.h"

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
extern "C" int __tsan_atomic32_fetch_add(volatile int* address, int value, int order);
#endif

namespace simt {
namespace {

constexpr int kRedZone = 128;
constexpr int kMaxArrays = 16;
constexpr int kCopyBytes = 16;
constexpr int kPoison = 0xFF;  // NaN in every floating format of the kernels

void poison(const void* address, size_t bytes) {
#if defined(SIMT_ASAN)
    __asan_poison_memory_region(address, bytes);
#else
    (void)address;
    (void)bytes;
#endif
}

void unpoison(const void* address, size_t bytes) {
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(address, bytes);
#else
    (void)address;
    (void)bytes;
#endif
}

bool is_poisoned(const void* address, size_t bytes) {
#if defined(SIMT_ASAN)
    return __asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr;
#else
    (void)address;
    (void)bytes;
    return false;
#endif
}

bool inside(const void* address, size_t bytes, const void* data, size_t size) {
    const auto first = reinterpret_cast<uintptr_t>(address);
    const auto start = reinterpret_cast<uintptr_t>(data);
    return first >= start && first + bytes <= start + size;
}

}  // namespace

void sanitizer_read(const void* address, size_t bytes) {
#if defined(SIMT_TSAN)
    __tsan_read_range(const_cast<void*>(address), bytes);
#else
    (void)address;
    (void)bytes;
#endif
}

void sanitizer_write(void* address, size_t bytes) {
#if defined(SIMT_TSAN)
    __tsan_write_range(address, bytes);
#else
    (void)address;
    (void)bytes;
#endif
}

void sanitizer_acquire(void* token) {
#if defined(SIMT_TSAN)
    __tsan_acquire(token);
#else
    (void)token;
#endif
}

void sanitizer_release(void* token) {
#if defined(SIMT_TSAN)
    __tsan_release(token);
#else
    (void)token;
#endif
}

void begin_shared_memory() {
    block.shared.clear();
    if (block.launch->shared_bytes == 0)
        return;
    const size_t size =
        static_cast<size_t>(block.launch->shared_bytes) + kRedZone * (kMaxArrays + 1);
    if (size > block.shared_capacity) {
        if (block.shared_memory)
            munmap(block.shared_memory, block.shared_capacity);
        void* memory =
            mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            throw std::bad_alloc();
        block.shared_memory = static_cast<unsigned char*>(memory);
        block.shared_capacity = size;
    }
    unpoison(block.shared_memory, size);
    std::memset(block.shared_memory, kPoison, size);
    poison(block.shared_memory, size);
}

void end_shared_memory() {
#if defined(SIMT_TSAN)
    // The next block gets fresh pages: shared ones would carry this block's accesses and look like
    // races between blocks.
    if (block.shared_memory)
        munmap(block.shared_memory, block.shared_capacity);
    block.shared_memory = nullptr;
    block.shared_capacity = 0;
#else
    if (block.shared_memory)
        unpoison(block.shared_memory, block.shared_capacity);
#endif
}

unsigned char* shared_array(int offset, int bytes, Site site) {
    for (const SharedArray& array : block.shared)
        if (array.offset == offset) {
            if (array.bytes != bytes)
                fail(site, "threads take shared arrays of different sizes: %d and %d bytes",
                     array.bytes, bytes);
            return array.data;
        }
    if (offset + bytes > block.launch->shared_bytes)
        fail(site, "shared memory: the kernel takes at least %d bytes, the launch gives %d",
             offset + bytes, block.launch->shared_bytes);
    const int index = static_cast<int>(block.shared.size());
    if (index == kMaxArrays)
        fail(site, "more than %d shared arrays", kMaxArrays);
    unsigned char* data = block.shared_memory + offset + kRedZone * (index + 1);
    unpoison(data, bytes);
    block.shared.push_back({offset, data, bytes});
    return data;
}

void check_shared(const void* address, size_t bytes, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        fail(site, "misaligned access of %zu bytes to shared memory", bytes);
    for (const SharedArray& array : block.shared)
        if (inside(address, bytes, array.data, array.bytes))
            return;
    fail(site, "access of %zu bytes to shared memory outside its arrays", bytes);
}

void check_global(const void* address, size_t bytes, bool write, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        fail(site, "misaligned access of %zu bytes to global memory", bytes);
    (write ? counts.global_write_bytes : counts.global_read_bytes) += bytes;
    const std::vector<Buffer>& buffers = block.launch->buffers;
    for (size_t i = 0; i < buffers.size(); ++i) {
        const Buffer& buffer = buffers[(block.last_buffer + i) % buffers.size()];
        if (!inside(address, bytes, buffer.data, buffer.bytes) || (write && !buffer.writable))
            continue;
        block.last_buffer = (block.last_buffer + i) % buffers.size();
        if (is_poisoned(address, bytes))
            fail(site, "access of %zu bytes to '%s' beyond its allocation", bytes, buffer.name);
        return;
    }
    for (const Buffer& buffer : buffers)
        if (inside(address, bytes, buffer.data, buffer.bytes))
            fail(site, "write to '%s', which is read-only", buffer.name);
    fail(site, "%s of %zu bytes outside the buffers of the launch", write ? "write" : "read",
         bytes);
}

void copy_async(void* target, const void* source, bool valid, Site site) {
    check_shared(target, kCopyBytes, site);
    if (valid) {
        check_global(source, kCopyBytes, false, site);
        counts.global_read_bytes -= kCopyBytes;
        counts.async_copy_bytes += kCopyBytes;
    }
    // Poison now and deliver at the wait: a copy into a tile that is still being read, and a read
    // without its wait, both show as NaN.
    sanitizer_write(target, kCopyBytes);
    std::memset(target, kPoison, kCopyBytes);
    Thread& self = *block.current;
    self.site = site;
    self.copies.push_back({target, valid ? source : nullptr, self.committed});
}

void copy_commit() { ++block.current->committed; }

void copy_wait(int pending, Site site) {
    Thread& self = *block.current;
    self.site = site;
    const int delivered = self.committed - pending;
    size_t kept = 0;
    for (const PendingCopy& copy : self.copies) {
        if (copy.group >= delivered) {
            self.copies[kept++] = copy;
            continue;
        }
        sanitizer_write(copy.target, kCopyBytes);
        if (copy.source) {
            sanitizer_read(copy.source, kCopyBytes);
            std::memcpy(copy.target, copy.source, kCopyBytes);
        } else {
            std::memset(copy.target, 0, kCopyBytes);
        }
    }
    self.copies.resize(kept);
}

}  // namespace simt
