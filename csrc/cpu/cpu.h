// The CPU kernels as the bindings see them.
#pragma once

#include <string>
#include <vector>

#include "cpu/params.h"

namespace afa::cpu {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

const char* isa_name(Isa isa);

// The instruction sets that this build holds and this machine runs, from the least to the best.
std::vector<Isa> available_isas();

// The one in use: the best available one, or what the environment variable AFA_CPU_ISA names.
// Throws std::invalid_argument if the machine or the build lacks that one.
Isa selected_isa();

// Run on params.threads threads at most, whose number never changes a bit of the results.
void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

// Names of the vector features that the machine and its operating system offer ("avx2", "amx_bf16",
// ...).
std::vector<std::string> machine_features();

}  // namespace afa::cpu
