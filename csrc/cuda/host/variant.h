// Launches other than the chosen ones, to be measured on a GPU (tools/gpu_measure.py).
//
// With -DAFA_CUDA_VARIANTS=ON the environment variable AFA_CUDA_VARIANT names them when a process
// first asks: "stages=3 chunks=8 overlap=0 carveout=-1". A build for users reads nothing.
#pragma once

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/kernels/tiles.h"

namespace afa {

struct Variant {
    int stages = kMaxStages;  // at most, of a ring
    int chunks = 0;           // of rows at most; 0: no limit
    int overlap = 1;          // whether a kernel may start before the one before it has ended
    int carveout = 100;       // percent of a multiprocessor's L1 kept for shared memory; -1: unsaid
};

#ifdef AFA_CUDA_VARIANTS
inline Variant variant_of(const char* text) {
    Variant found;
    std::istringstream words(text);
    for (std::string word; words >> word;) {
        const size_t split = word.find('=');
        const std::string name = word.substr(0, split);
        int* field = name == "stages"     ? &found.stages
                     : name == "chunks"   ? &found.chunks
                     : name == "overlap"  ? &found.overlap
                     : name == "carveout" ? &found.carveout
                                          : nullptr;
        if (!field || split == std::string::npos)
            throw std::invalid_argument(
                "AFA_CUDA_VARIANT: expected stages=, chunks=, overlap= or carveout=, got " + word);
        *field = std::stoi(word.substr(split + 1));
    }
    return found;
}

inline const Variant& variant() {
    static const Variant chosen = [] {
        const char* text = std::getenv("AFA_CUDA_VARIANT");
        return text ? variant_of(text) : Variant();
    }();
    return chosen;
}
#else
constexpr Variant variant() { return {}; }
#endif

}  // namespace afa
