// Calls the kernels of the instruction set in use.
#include "cpu/cpu.h"
#include "cpu/features.h"

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
#elif defined(AFA_AARCH64)
namespace neon {
extern const Kernels kernels;
}
namespace neonbf16 {
extern const Kernels kernels;
}
#endif

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
    case Isa::neon:
        return "neon";
    case Isa::neonbf16:
        return "neonbf16";
    default:
        return "generic";
    }
}

const std::vector<Isa>& available_isas() { return machine().isas; }

Isa selected_isa() { return machine().isas.back(); }

std::vector<std::string> machine_features() {
    const Features& features = machine().features;
    std::vector<std::string> names;
    const auto add = [&](const char* name, bool present) {
        if (present)
            names.push_back(name);
    };
    add("avx2", features.avx2);
    add("avx512", features.avx512);
    add("avx512_bf16", features.avx512_bf16);
    add("avx512_halved", features.avx512_halved);
    add("amx_tile", features.amx_tile);
    add("amx_bf16", features.amx_bf16);
    add("neon", features.neon);
    add("neon_bf16", features.neon_bf16);
    return names;
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
#elif defined(AFA_AARCH64)
    case Isa::neon:
        return neon::kernels;
    case Isa::neonbf16:
        return neonbf16::kernels;
#endif
    default:
        return generic::kernels;
    }
}

}  // namespace

void forward(const ForwardParams& params) { selected_kernels().forward(params); }

void backward(const BackwardParams& params) { selected_kernels().backward(params); }

}  // namespace afa::cpu
