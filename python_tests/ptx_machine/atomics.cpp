// atom and red on words of global memory, and the fences. Lanes take their turns in order.
#include "ptx_machine/forms.h"
#include "ptx_machine/memory.h"

namespace ptx {
namespace {

using Update = uint32_t (*)(uint32_t old, uint32_t b, uint32_t c);

uint32_t add(uint32_t old, uint32_t b, uint32_t) { return old + b; }
uint32_t increment(uint32_t old, uint32_t b, uint32_t) { return old >= b ? 0 : old + 1; }
uint32_t exchange(uint32_t, uint32_t b, uint32_t) { return b; }
uint32_t compare_and_swap(uint32_t old, uint32_t b, uint32_t c) { return old == b ? c : old; }

// Among the threads of a CTA only: to another CTA, a store as any other.
enum class Scope { cta, gpu };

// Operands: (result,) [address], b (, c).
template <Update kUpdate, bool kResult, bool kThird, Scope kScope, bool kAcquires, bool kReleases>
void atomic(Warp& warp, const Instruction& i) {
    const uint32_t* op = i.op + kResult;
    const Address address(warp, op);
    const uint32_t *b = warp.in<uint32_t>(op[3]), *c = kThird ? warp.in<uint32_t>(op[4]) : b;
    uint32_t result[kLanes] = {};
    WarpTraffic traffic;
    for_active(warp, [&](int lane) {
        const uint64_t at = address[lane];
        const Access access = kScope == Scope::gpu ? Access::atomic : Access::store;
        traffic.add(at, global_access(warp, lane, at, 4, access));
        if constexpr (kScope == Scope::gpu)
            warp.cta->races->synchronize(warp, lane, at, {kAcquires, kReleases}, i.line);
        auto* word = reinterpret_cast<unsigned char*>(at);
        std::memcpy(&result[lane], word, 4);
        const uint32_t changed = kUpdate(result[lane], b[lane], c[lane]);
        std::memcpy(word, &changed, 4);
    });
    const uint64_t lanes = static_cast<uint64_t>(__builtin_popcount(warp.active));
    traffic.count(*warp.cta->global, 4, true, warp.cta->traffic, warp.cta->counters);
    warp.cta->counters.global_write_bytes += lanes * 4;
    if constexpr (kResult) {
        warp.cta->counters.global_read_bytes += lanes * 4;
        traffic.count(*warp.cta->global, 4, false, warp.cta->traffic, warp.cta->counters);
        if (i.op[0] != kSink)
            warp.out(i.op[0], result);
    }
}

void fence(Warp& warp, const Instruction& i) { warp.cta->races->fence(warp, i.line); }

// Orders the threads of a CTA, which only barriers do here.
void fence_of_cta(Warp&, const Instruction&) {}

template <Update kUpdate, bool kResult, bool kThird, bool kAcquires, bool kReleases>
void add_order(Forms& f, const std::string& order, const std::string& operation) {
    const std::string base = kResult ? "atom" : "red";
    const char* operands = !kResult ? "md" : kThird ? "_mdd" : "_md";
    for (const char* scope : {"", ".cta", ".gpu", ".sys"}) {
        const Execute execute =
            std::string(scope) == ".cta"
                ? atomic<kUpdate, kResult, kThird, Scope::cta, kAcquires, kReleases>
                : atomic<kUpdate, kResult, kThird, Scope::gpu, kAcquires, kReleases>;
        f.add(base + order + scope + ".global" + operation, operands, execute);
        if (!order.empty() || *scope)  // the compilers' order of the same words
            f.add(base + ".global" + scope + order + operation, operands, execute);
    }
}

template <Update kUpdate, bool kThird = false>
void add_operation(Forms& f, const std::string& operation) {
    add_order<kUpdate, true, kThird, false, false>(f, "", operation);
    add_order<kUpdate, true, kThird, false, false>(f, ".relaxed", operation);
    add_order<kUpdate, true, kThird, true, false>(f, ".acquire", operation);
    add_order<kUpdate, true, kThird, false, true>(f, ".release", operation);
    add_order<kUpdate, true, kThird, true, true>(f, ".acq_rel", operation);
}

template <Update kUpdate>
void add_reduction(Forms& f, const std::string& operation) {
    add_order<kUpdate, false, false, false, false>(f, "", operation);
    add_order<kUpdate, false, false, false, false>(f, ".relaxed", operation);
    add_order<kUpdate, false, false, false, true>(f, ".release", operation);
}

}  // namespace

void add_atomic_forms(Forms& f) {
    add_operation<add>(f, ".add.u32");
    add_operation<increment>(f, ".inc.u32");
    add_operation<exchange>(f, ".exch.b32");
    add_operation<compare_and_swap, true>(f, ".cas.b32");
    add_reduction<add>(f, ".add.u32");
    add_reduction<increment>(f, ".inc.u32");
    for (const char* name : {"fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu",
                             "fence.sc.sys", "membar.gl", "membar.sys"})
        f.add(name, "", fence);
    for (const char* name : {"fence.acq_rel.cta", "fence.sc.cta", "membar.cta"})
        f.add(name, "", fence_of_cta);
}

}  // namespace ptx
