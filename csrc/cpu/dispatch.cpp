// Chooses the instruction set, once per process.
#include "cpu/cpu.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(AFA_X86_64)
#include <cpuid.h>
#endif
#if defined(AFA_X86_64) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace afa::cpu {

namespace generic {
extern const Kernels kernels;
}
#if defined(AFA_X86_64)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

namespace {

#if defined(AFA_X86_64)
struct Features {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_tile = false, amx_bf16 = false;
    bool avx512_halved = false;  // a 512-bit instruction runs as two of 256 bits
};

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
    found.amx_tile = (d & (1u << 24)) && (state & kTiles) == kTiles;
    found.amx_bf16 = found.amx_tile && (d & (1u << 22));
    if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
        found.avx512_bf16 = found.avx512 && (a & (1u << 5));
    found.avx512_halved = found.avx512 && is_zen4();
    return found;
}

const Features& features() {
    static const Features found = detect();
    return found;
}

// Whether the AMX kernels may run: their vector code needs AVX-512 with BF16, and Linux keeps the
// tile registers from a process until it asks for them once.
bool amx_usable() {
#if defined(AFA_EMULATE_AMX)
    return features().avx512_bf16;
#elif defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    static const bool usable = features().avx512_bf16 && features().amx_bf16 &&
                               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return usable;
#else
    return false;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
    case Isa::avx2:
        return "avx2";
    case Isa::avx512:
        return "avx512";
    case Isa::avx512bf16:
        return "avx512bf16";
    case Isa::amx:
        return "amx";
    default:
        return "generic";
    }
}

std::vector<Isa> available_isas() {
    std::vector<Isa> isas{Isa::generic};
#if defined(AFA_X86_64)
    if (features().avx2)
        isas.push_back(Isa::avx2);
    if (features().avx512)
        isas.push_back(Isa::avx512);
    if (features().avx512_bf16)
        isas.push_back(Isa::avx512bf16);
    if (amx_usable())
        isas.push_back(Isa::amx);
#endif
    return isas;
}

namespace {

Isa select_isa() {
    const std::vector<Isa> isas = available_isas();
    const char* forced = std::getenv("AFA_CPU_ISA");
    if (forced == nullptr || *forced == '\0')
        return isas.back();
    std::string names;
    for (const Isa isa : isas) {
        if (std::string(forced) == isa_name(isa))
            return isa;
        names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
    }
    throw std::invalid_argument("AFA_CPU_ISA: expected one that this machine and build have (" +
                                names + "), got '" + forced + "'");
}

}  // namespace

Isa selected_isa() {
    static const Isa isa = select_isa();
    return isa;
}

namespace {

const Kernels& selected_kernels() {
    switch (selected_isa()) {
#if defined(AFA_X86_64)
    case Isa::avx2:
        return avx2::kernels;
    case Isa::avx512:
        return avx512::kernels;
    case Isa::avx512bf16:
        return avx512bf16::kernels;
    case Isa::amx:
        return amx::kernels;
#endif
    default:
        return generic::kernels;
    }
}

}  // namespace

void forward(const ForwardParams& params) { selected_kernels().forward(params); }

void backward(const BackwardParams& params) { selected_kernels().backward(params); }

std::vector<std::string> machine_features() {
    std::vector<std::string> names;
#if defined(AFA_X86_64)
    const Features& f = features();
    if (f.avx2)
        names.push_back("avx2");
    if (f.avx512)
        names.push_back("avx512");
    if (f.avx512_bf16)
        names.push_back("avx512_bf16");
    if (f.avx512_halved)
        names.push_back("avx512_halved");
    if (f.amx_tile)
        names.push_back("amx_tile");
    if (f.amx_bf16)
        names.push_back("amx_bf16");
#endif
    return names;
}

}  // namespace afa::cpu
