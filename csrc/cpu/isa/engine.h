// What an engine is: the three products that forward and backward consist of, and the formats of
// their operands.
//
// There are three engines: Wide (float32), Pair (pairs of bfloat16) and Tiles (AMX). The passes of
// forward.h and backward.h are written once, for any engine E:
//
//   E::dot      z += x P^T             x (rows, cols), P (r, cols)
//   E::expand   out = base + h P       h (rows, r), P (r, cols)
//   E::outer    sums += h^T x          h (rows, r), x (rows, cols)
//
// P is A or the transpose of B. It is cut into slabs of E::kSlab columns, and each slab is packed
// into a panel, in the order in which a product reads it. h (in the backward also dz) comes as
// Coefficients. x (also dY) is read where it lies, or from a copy that operands.h made.
#pragma once

#include "cpu/isa/vec.h"

namespace afa::cpu::AFA_ISA {

// The rows of a panel that hold one factor: `count` of them, its r padded, from row `first` on;
// `of` is the number of all rows, where several factors lie side by side.
struct PanelRows {
    int64_t first, count, of;
};
static inline PanelRows all_rows(int64_t rp) { return {0, rp, rp}; }

// A block of rows of h or dz, once for each product that reads it.
template <class E>
struct Coefficients {
    const typename E::Elem* rows;     // for expand, which sums over r
    const typename E::Elem* columns;  // for outer, which sums over the rows
};

// The rows from m on, a multiple of E::kExpandRows, for expand alone.
template <class E>
static inline Coefficients<E> from_row(const Coefficients<E>& h, int64_t m, int64_t rp) {
    return {h.rows + m * E::expand_rank(rp), nullptr};
}

// The result of outer, (rp, cols), tile by tile of E::kTile columns. In memory row j of tile t is
// E::kTile neighbouring floats at data + t * tile + j * row.
struct Sums {
    float* data;
    int64_t tile, row;
};

// Calls f with each row of each tile of the first `cols` columns.
template <class E, class F>
static inline void for_each_row(const Sums& sums, int64_t rp, int64_t cols, F&& f) {
    for (int64_t t = 0; t < ceil_div(cols, E::kTile); ++t)
        for (int64_t j = 0; j < rp; ++j)
            f(sums.data + t * sums.tile + j * sums.row);
}

}  // namespace afa::cpu::AFA_ISA
