// Chooses the types of a call and runs it; the only thing that leaves the namespace of the
// instruction set.
#pragma once

#include "cpu/isa/backward.h"
#include "cpu/isa/forward.h"
#include "cpu/isa/pair.h"
#include "cpu/isa/tiles.h"

namespace afa::cpu::AFA_ISA {

template <template <class, class> class Pass, class Params>
static void run(const Params& params) {
    switch (params.dtype) {
    case Dtype::bf16:
#if AFA_ISA_LEVEL >= 4
        // Packing the factors for AMX is worth it from a few rows on.
        if (params.m > Tiles::kBlockRows)
            return Pass<bf16, Tiles>(params).run();
#endif
#if AFA_ISA_LEVEL >= 3
        return Pass<bf16, Pair>(params).run();
#else
        return Pass<bf16, Wide>(params).run();
#endif
    case Dtype::f16:
        return Pass<f16, Wide>(params).run();
    default:
        return Pass<float, Wide>(params).run();
    }
}

extern const Kernels kernels;
const Kernels kernels{run<Forward, ForwardParams>, run<Backward, BackwardParams>};

}  // namespace afa::cpu::AFA_ISA
