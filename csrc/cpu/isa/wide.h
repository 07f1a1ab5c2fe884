// The engine in float32: operands of 16 bits are widened when they are staged or packed.
#pragma once

#include "cpu/isa/row_groups.h"

namespace afa::cpu::AFA_ISA {

struct Wide : RowGroups<Wide> {
    using Elem = float;
    using Operand = Vec;
    static constexpr int kDepth = 1;
    static constexpr int kSlab = 256;
    static constexpr bool kOnePanel = true;  // serves dot and expand

    static Operand load_operand(const float* p) { return load(p); }
    static Operand broadcast_operand(const float* p) { return broadcast(*p); }
    static Vec multiply_add(Operand a, Operand b, Vec sum) { return fma(a, b, sum); }

    static int64_t coefficient_bytes(int64_t, int64_t) { return 0; }
    static Coefficients<Wide> view_coefficients(const float* h, int64_t, int64_t, void*) {
        return {h, h};
    }
    static Coefficients<Wide> pack_coefficients(const float* h, int64_t rows, int64_t ld,
                                                void* memory) {
        return view_coefficients(h, rows, ld, memory);
    }

    // Row m of one tile of columns, widened. Also in float32 it is worth this copy: rows of x often
    // lie a multiple of a power of two apart, and then fall into one set of the L1 cache, so that
    // each group of rows of h would fetch them from L2 again.
    template <class Src>
    static inline __attribute__((always_inline)) void pack_outer(const Src* x, int64_t ldx, int64_t,
                                                                 int64_t m, Elem* packed) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            store(packed + m * kTile + v * kLanes, load(x + m * ldx + v * kLanes));
    }
};

}  // namespace afa::cpu::AFA_ISA
