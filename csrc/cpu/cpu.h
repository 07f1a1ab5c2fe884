// The CPU kernels as the bindings see them.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/params.h"

namespace afa::cpu {

// From the least to the best of an architecture: a machine that has one has those before it.
enum class Isa : int { generic, avx2, avx512, avx512bf16, amx, neon, neonbf16 };
constexpr Isa kIsas[] = {Isa::generic, Isa::avx2, Isa::avx512,  Isa::avx512bf16,
                         Isa::amx,     Isa::neon, Isa::neonbf16};

const char* isa_name(Isa isa);

// AFA_CPU_ISA names an instruction set that the machine or the build lacks.
struct MissingIsa : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// The environment variable AFA_CPU_ISA names the best instruction set that the machine is believed
// to have, and what follows is cut to it. All three throw MissingIsa if the machine or the build
// lacks that one, std::invalid_argument if there is none of that name.

// The instruction sets that this build holds and this machine runs, from the least to the best.
const std::vector<Isa>& available_isas();

// The one in use: the best of them.
Isa selected_isa();

// The vector features that the machine and its operating system offer, by name.
std::vector<std::string> machine_features();

// Run on params.threads threads at most, whose number never changes a bit of the results.
void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

}  // namespace afa::cpu
