// What the engines of the three products have in common.
//
// An engine E is a set of static functions and formats: Wide (float32), Pair (bfloat16 pairs) or
// Tiles (AMX). The passes of forward.h and backward.h are written once, for any of them:
//
//   E::dot      z += x P^T, x (rows, cols), P (r, cols)
//   E::expand   out = base + s h P, h (rows, r)
//   E::outer    sums += h^T x, h (rows, r), x (rows, cols)
//
// P is read from panels, slab by slab of E::kSlab columns; h and dz come as Coefficients; x and dY
// directly or staged (operands.h).
#pragma once

#include "cpu/isa/target.h"

namespace afa::cpu::AFA_ISA {

// The rows of h or dz in the formats that the products read.
template <class E>
struct Coefficients {
    const float* wide;                // [rows][ld]
    const typename E::Elem* rows;     // as the left factor of P
    const typename E::Elem* columns;  // as the left factor of dY or x, contracted over the rows
};

// What expand reads of them from row m on, a multiple of E::kExpandRows.
template <class E>
static inline Coefficients<E> from_row(const Coefficients<E>& h, int64_t m, int64_t rp) {
    return {h.wide + m * rp, h.rows == nullptr ? nullptr : h.rows + m * E::expand_rank(rp),
            nullptr};
}

// Sums over rows, rp of them for each column: those of tile t are rows of kTile floats, row j at
// data + t * tile + j * row.
struct Sums {
    float* data;
    int64_t tile, row;
};

// Calls f with each row of the tiles of `cols` columns.
template <class E, class F>
static inline void for_each_row(const Sums& sums, int64_t rp, int64_t cols, F&& f) {
    for (int64_t t = 0; t < ceil_div(cols, E::kTile); ++t)
        for (int64_t j = 0; j < rp; ++j)
            f(sums.data + t * sums.tile + j * sums.row);
}

// What an engine inherits that takes a few rows at a time and keeps their sums in vectors. It has
// dot_rows<n>, expand_rows<n>, and for `outer`, which takes kOuterRows rows of x and h at once:
// pack_outer, outer_left, outer_right, and multiply_add of two Operands.
template <class E>
struct RowGroups {
    static constexpr int64_t kBlockRows = 48;          // rows that are staged together
    static constexpr int64_t kRowStep = 1;             // rows of a staged block are padded to this
    static constexpr int64_t kRankStep = 4;            // r is padded to this
    static constexpr int64_t kExpandRows = kRowGroup;  // that expand takes at once
    static constexpr bool kHasDotInPlace = true;
    static constexpr int64_t kL1Panels = 16 << 10;  // bytes of panels that stay in L1
    static constexpr int64_t kTilesAhead = 4;       // from the one at work to the one asked for
    struct Scope {};                                // what a thread holds while it runs products

    static int64_t expand_rank(int64_t rp) { return rp; }

    // z[rows][rp] += x P^T over `tiles` tiles of columns, P in a panel.
    template <class Elem>
    static void dot(const Elem* x, int64_t ldx, int64_t rows, const Elem* panel, int64_t rp,
                    int64_t tiles, float* z, int64_t ldz) {
        dot_by_rows<true>(x, ldx, rows, panel, 0, rp, tiles, z, ldz);
    }
    // The same with P where it lies, its rows ldp apart.
    template <class Elem>
    static void dot_in_place(const Elem* x, int64_t ldx, int64_t rows, const Elem* p, int64_t ldp,
                             int64_t rp, int64_t tiles, float* z, int64_t ldz) {
        dot_by_rows<false>(x, ldx, rows, p, ldp, rp, tiles, z, ldz);
    }
    template <bool kPanel, class Elem>
    static void dot_by_rows(const Elem* x, int64_t ldx, int64_t rows, const Elem* p, int64_t ldp,
                            int64_t rp, int64_t tiles, float* z, int64_t ldz) {
        int64_t m = 0;
        for (; m + kRowGroup <= rows; m += kRowGroup)
            E::template dot_rows<kRowGroup, kPanel>(x + m * ldx, ldx, p, ldp, rp, tiles,
                                                    z + m * ldz, ldz);
        x += m * ldx;
        z += m * ldz;
        switch (rows - m) {
        case 1:
            return E::template dot_rows<1, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
        case 2:
            return E::template dot_rows<2, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
#if AFA_ISA_LEVEL >= 2
        case 3:
            return E::template dot_rows<3, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
        case 4:
            return E::template dot_rows<4, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
        case 5:
            return E::template dot_rows<5, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
#endif
        }
    }

    // The first `rows` rows and `cols` columns of the target, within one slab: a few tiles at a
    // time whose panels stay in L1, and of those each group of rows from left to right, as
    // prefetchers like it.
    template <class Elem, class T>
    static void expand(const Coefficients<E>& h, int64_t rows, int64_t rp, int64_t r,
                       const Elem* panel, const Target<T>& target, int64_t cols) {
        const int64_t tile_bytes = rp * E::kTile * static_cast<int64_t>(sizeof(Elem));
        const int64_t chunk = E::kTile * (tile_bytes < kL1Panels ? kL1Panels / tile_bytes : 1);
        for (int64_t c = 0; c < cols; c += chunk)
            expand_tiles(h, rows, rp, r, panel, target, c, min_of(c + chunk, cols));
    }
    // Meanwhile the tile is on its way that comes kTilesAhead later, in this group of rows, in the
    // next one, or in the next chunk.
    template <int kRows, class Elem, class T>
    static void expand_group(const Coefficients<E>& h, int64_t row, int64_t rows, int64_t rp,
                             int64_t r, const Elem* panel, const Target<T>& target, int64_t begin,
                             int64_t end) {
        const int64_t width = round_up(end - begin, E::kTile), skip = kTilesAhead * E::kTile;
        int64_t next_row = row + skip / width * kRows, next_col = begin + skip % width;
        for (int64_t c = begin; c < end; c += E::kTile, next_col += E::kTile) {
            if (next_col >= begin + width) {
                next_col -= width;
                next_row += kRows;
            }
            if (next_row < rows)
                prefetch_target(target, next_row, next_col, kRows);
            else
                prefetch_target(target, next_row - rows, next_col + width, kRows);
            E::template expand_rows<kRows>(h, row, rp, r, panel + c * rp, target, row, c,
                                           static_cast<int>(min_of<int64_t>(E::kTile, end - c)));
        }
    }
    template <class Elem, class T>
    static void expand_tiles(const Coefficients<E>& h, int64_t rows, int64_t rp, int64_t r,
                             const Elem* panel, const Target<T>& target, int64_t begin,
                             int64_t end) {
        int64_t m = 0;
        for (; m + kRowGroup <= rows; m += kRowGroup)
            expand_group<kRowGroup>(h, m, rows, rp, r, panel, target, begin, end);
        switch (rows - m) {
        case 1:
            return expand_group<1>(h, m, rows, rp, r, panel, target, begin, end);
        case 2:
            return expand_group<2>(h, m, rows, rp, r, panel, target, begin, end);
#if AFA_ISA_LEVEL >= 2
        case 3:
            return expand_group<3>(h, m, rows, rp, r, panel, target, begin, end);
        case 4:
            return expand_group<4>(h, m, rows, rp, r, panel, target, begin, end);
        case 5:
            return expand_group<5>(h, m, rows, rp, r, panel, target, begin, end);
#endif
        }
    }

    // sums += h^T x over the first `cols` columns, whole tiles. `packed` holds two
    // tiles of kBlockRows rows: while one is multiplied, the next is packed, and the one that comes
    // kTilesAhead later is on its way; behind x that is `after`. Null: x is in the cache.
    template <class Elem>
    static void outer(const Coefficients<E>& h, int64_t rows, int64_t rp, const Elem* x,
                      int64_t ldx, int64_t cols, const Sums& sums, Elem* packed,
                      const Elem* after) {
        Elem* next = packed + kBlockRows * E::kTile;
        for (int64_t m = 0; m < rows; m += E::kOuterRows)
            E::pack_outer(x, ldx, rows, m, packed);
        for (int64_t c = 0; c < cols; c += E::kTile) {
            const int64_t later = c + kTilesAhead * E::kTile;
            const Elem* ahead = after == nullptr ? nullptr
                                : later < cols   ? x + later
                                                 : after + (later - cols);
            const Sums tile{sums.data + c / E::kTile * sums.tile, 0, sums.row};
            if (c + E::kTile < cols)
                outer_tile<true>(h, rows, rp, packed, tile, x + c + E::kTile, ldx, next, ahead);
            else
                outer_tile<false>(h, rows, rp, packed, tile, x, ldx, next, ahead);
            Elem* done = packed;
            packed = next;
            next = done;
        }
    }
    // One tile: sums[j][column] += sum over rows of h[row][j] * x[row][column], x packed; meanwhile
    // the next tile, whose rows begin at `x`, is packed into `next`, and the one at `ahead` asked
    // for.
    template <bool kPackNext, class Elem>
    static void outer_tile(const Coefficients<E>& h, int64_t rows, int64_t ld, const Elem* packed,
                           const Sums& sums, const Elem* x, int64_t ldx, Elem* next,
                           const Elem* ahead) {
        constexpr int kWidth = AFA_ISA_LEVEL >= 2 ? 4 : 2;
        const Elem* none = nullptr;
        outer_group<kPackNext, kWidth>(h, rows, ld, 0, packed, sums.data, sums.row, x, ldx, next,
                                       ahead);
        for (int64_t j = kGroup; j < ld; j += kGroup)
            outer_group<false, kWidth>(h, rows, ld, j, packed, sums.data, sums.row, x, ldx, next,
                                       none);
        for (int v = kWidth; v < kVectors; v += kWidth)
            for (int64_t j = 0; j < ld; j += kGroup)
                outer_group<false, kWidth>(h, rows, ld, j, packed + v * kLanes,
                                           sums.data + v * kLanes, sums.row, x, ldx, next, none);
    }
    template <bool kPackNext, int kWidth, class Elem>
    static inline __attribute__((always_inline)) void
    outer_group(const Coefficients<E>& h, int64_t rows, int64_t ld, int64_t j, const Elem* packed,
                float* sums, int64_t ld_sums, const Elem* x, int64_t ldx, Elem* next,
                const Elem* ahead) {
        constexpr int kRows = E::kOuterRows;
        Vec acc[kGroup][kWidth];
        for (int g = 0; g < kGroup; ++g)
            for (int v = 0; v < kWidth; ++v)
                acc[g][v] = zero();
        for (int64_t m = 0; m < rows; m += kRows) {
            if constexpr (kPackNext)
                E::pack_outer(x, ldx, rows, m, next);
            if (ahead != nullptr)
                prefetch_tile(ahead + m * ldx, ldx, kRows);
            typename E::Operand right[kWidth];
#pragma GCC unroll 4
            for (int v = 0; v < kWidth; ++v)
                right[v] = E::outer_right(packed + m * E::kTile + v * kRows * kLanes);
#pragma GCC unroll 4
            for (int g = 0; g < kGroup; ++g) {
                const typename E::Operand left = E::outer_left(h, m * ld + kRows * (j + g));
#pragma GCC unroll 4
                for (int v = 0; v < kWidth; ++v)
                    acc[g][v] = E::multiply_add(left, right[v], acc[g][v]);
            }
        }
        for (int g = 0; g < kGroup; ++g)
            for (int v = 0; v < kWidth; ++v) {
                float* out = sums + (j + g) * ld_sums + v * kLanes;
                store(out, load(out) + acc[g][v]);
            }
    }

    // Brings finished sums into the order of the columns.
    static void finish_sums(const Sums&, int64_t, int64_t) {}
};

}  // namespace afa::cpu::AFA_ISA
