// What the machine offers to the CPU kernels, cut to what AFA_CPU_ISA allows.
#pragma once

#include <string>
#include <vector>

#include "cpu/cpu.h"

namespace afa::cpu {

struct Features {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_tile = false, amx_bf16 = false;
    bool avx512_halved = false;  // a 512-bit instruction runs as two of 256 bits
    bool neon = false, neon_bf16 = false;
};

struct Machine {
    Features features;
    std::vector<Isa> isas;  // that build and machine have, from the least to the best
};

// Read once per process. Under AFA_CPU_ISA the machine is one whose best instruction set is the
// named one. Throws MissingIsa or std::invalid_argument as selected_isa() does.
const Machine& machine();

}  // namespace afa::cpu
