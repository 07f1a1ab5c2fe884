#include "cpu/features.h"

#include <cstdint>
#include <cstdlib>
#include <iterator>

#if defined(AFA_X86_64)
#include <cpuid.h>
#endif
#if defined(AFA_X86_64) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(AFA_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace afa::cpu {

namespace {

#if defined(AFA_X86_64)

// XCR0: the register files that the operating system saves on a context switch.
uint64_t enabled_state() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

// AMD's family 19h is Zen 3, without AVX-512, and Zen 4.
bool is_zen4() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || c != signature_AMD_ecx ||
        d != signature_AMD_edx || !__get_cpuid(1, &a, &b, &c, &d))
        return false;
    const uint32_t family = (a >> 8) & 0xF, extended_family = (a >> 20) & 0xFF;
    return family + extended_family == 0x19;
}

Features detect() {
    Features found;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return found;
    constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
    constexpr uint32_t kLeaf1 = kFma | kOsxsave | kAvx | kF16c;
    if ((c & kLeaf1) != kLeaf1)
        return found;
    const uint64_t state = enabled_state();
    constexpr uint64_t kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;
    if ((state & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return found;
    const uint32_t max_subleaf = a;
    constexpr uint32_t kAvx2 = 1u << 5, kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30,
                       kVl = 1u << 31;
    found.avx2 = b & kAvx2;
    constexpr uint32_t kAvx512 = kF | kDq | kBw | kVl;
    found.avx512 = found.avx2 && (b & kAvx512) == kAvx512 && (state & kZmm) == kZmm;
    found.avx512_halved = found.avx512 && is_zen4();
    found.amx_tile = (d & (1u << 24)) && (state & kTiles) == kTiles;
    found.amx_bf16 = found.amx_tile && (d & (1u << 22));
    if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
        found.avx512_bf16 = found.avx512 && (a & (1u << 5));
#if defined(AFA_EMULATE_BF16)
    found.avx512_bf16 = found.amx_tile = found.amx_bf16 = found.avx512;
#endif
    return found;
}

// Linux keeps the tile registers from a process until it asks for them once.
bool may_use_tiles() {
#if defined(AFA_EMULATE_BF16)
    return true;
#elif defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool has(const Features& features, Isa isa) {
    switch (isa) {
    case Isa::avx2:
        return features.avx2;
    case Isa::avx512:
        return features.avx512;
    case Isa::avx512bf16:
        return features.avx512_bf16;
    case Isa::amx:  // the vector code of its kernels needs AVX-512 with BF16
        return features.avx512_bf16 && features.amx_bf16 && may_use_tiles();
    default:
        return true;
    }
}

#elif defined(AFA_AARCH64)

// Every ARMv8-A that runs an operating system with floats in hardware has NEON. For what came later
// Linux is asked; elsewhere it is taken to be absent.
Features detect() {
    Features found;
#if defined(__linux__)
    constexpr unsigned long kAsimd = 1ul << 1, kBf16 = 1ul << 14;  // HWCAP_ASIMD, HWCAP2_BF16
    found.neon = getauxval(AT_HWCAP) & kAsimd;
    found.neon_bf16 = found.neon && (getauxval(AT_HWCAP2) & kBf16);
#else
    found.neon = true;
#endif
    return found;
}

bool has(const Features& features, Isa isa) {
    return isa == Isa::generic || (isa == Isa::neon && features.neon) ||
           (isa == Isa::neonbf16 && features.neon_bf16);
}

#else

Features detect() { return {}; }
bool has(const Features&, Isa isa) { return isa == Isa::generic; }

#endif

Features cut(Features features, Isa best) {
    features.avx2 &= best >= Isa::avx2;
    features.avx512 &= best >= Isa::avx512;
    features.avx512_halved &= best >= Isa::avx512;
    features.avx512_bf16 &= best >= Isa::avx512bf16;
    features.amx_tile &= best >= Isa::amx;
    features.amx_bf16 &= best >= Isa::amx;
    features.neon &= best >= Isa::neon;
    features.neon_bf16 &= best >= Isa::neonbf16;
    return features;
}

// Up to `best`.
Machine machine_up_to(Isa best) {
    Machine found{cut(detect(), best), {}};
    for (const Isa isa : kIsas)
        if (isa <= best && has(found.features, isa))
            found.isas.push_back(isa);
    return found;
}

std::string names_of(const std::vector<Isa>& isas) {
    std::string names;
    for (const Isa isa : isas)
        names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
    return names;
}

Machine read_machine() {
    const char* variable = std::getenv("AFA_CPU_ISA");
    const std::string name = variable == nullptr ? "" : variable;
    const Isa best = kIsas[std::size(kIsas) - 1];
    if (name.empty())
        return machine_up_to(best);
    const auto expected = [&] {
        return "AFA_CPU_ISA: expected one that this machine and build have (" +
               names_of(machine_up_to(best).isas) + "), got '" + name + "'";
    };
    for (const Isa isa : kIsas)
        if (name == isa_name(isa)) {
            Machine found = machine_up_to(isa);
            if (found.isas.back() != isa)
                throw MissingIsa(expected());
            return found;
        }
    throw std::invalid_argument(expected());
}

}  // namespace

const Machine& machine() {
    static const Machine found = read_machine();
    return found;
}

}  // namespace afa::cpu
