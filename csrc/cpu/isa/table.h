// The table of kernels of one instruction set, which is all that dispatch.cpp sees of it. The
// engine is chosen by dtype alone: each sums in an order of its own, and a row has the same bits in
// a call of any number of rows.
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
        return Pass<bf16, Tiles>(params).run();
#elif AFA_BF16_PAIRS
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
