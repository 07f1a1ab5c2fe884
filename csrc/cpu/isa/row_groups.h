// The three products of an engine that takes a few rows at a time and keeps their sums in vectors:
// Wide and Pair.
//
// A vector register holds an operand of kDepth * kLanes elements. With kDepth = 1 a lane is one
// float, with kDepth = 2 a pair of bfloat16 that are neighbours along the dimension that the
// product sums over. The engine E says how an operand is loaded and multiplied:
//
//   E::Elem, E::Operand, E::kDepth
//   E::load_operand(p)            kLanes lanes, side by side
//   E::broadcast_operand(p)       one lane, in all of them
//   E::multiply_add(a, b, sum)    sum + a b, lane by lane
//   E::pack_outer(x, ldx, rows, m, packed)
//                                 rows m .. m + kDepth - 1 of one tile of x, as operands that pair
//                                 neighbouring rows; x may be of 16 bits where Elem is not
//
// Panels: dot reads [tile][row of P][kTile columns], expand [tile][kDepth rows of
// P][column][kDepth], with zeros where P ends. With kDepth = 1 these are the same.
#pragma once

#include "cpu/isa/engine.h"
#include "cpu/isa/target.h"

namespace afa::cpu::AFA_ISA {

template <class E>
struct RowGroups {
    static constexpr int kTile = kVectors * kLanes;
    static constexpr int64_t kBlockRows = 48;          // rows that are staged together
    static constexpr int64_t kRowStep = 1;             // rows of a staged block are padded to this
    static constexpr int64_t kRankStep = 4;            // r is padded to this
    static constexpr int64_t kExpandRows = kRowGroup;  // that expand takes at once
    static constexpr bool kHasDotInPlace = true;
    static constexpr int64_t kL1Panels = 16 << 10;  // bytes of panels that stay in L1
    static constexpr int64_t kTilesAhead = 4;       // how far ahead tiles are prefetched
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

    // The first `rows` rows and `cols` columns of the target, within one slab. A few tiles at a
    // time, whose panels stay in L1; of those each group of rows from left to right, as prefetchers
    // like it.
    template <class Elem, class T>
    static void expand(const Coefficients<E>& h, int64_t rows, int64_t rp, int64_t r,
                       const Elem* panel, const Target<T>& target, int64_t cols) {
        const int64_t tile_bytes = rp * kTile * static_cast<int64_t>(sizeof(Elem));
        const int64_t chunk = kTile * (tile_bytes < kL1Panels ? kL1Panels / tile_bytes : 1);
        for (int64_t c = 0; c < cols; c += chunk)
            expand_tiles(h, rows, rp, r, panel, target, c, min_of(c + chunk, cols));
    }

    // sums += h^T x over the first `cols` columns, whole tiles of them.
    //
    // Three tiles of x are under way at a time: one is multiplied, the next one is packed, and the
    // one kTilesAhead further is prefetched. `packed` has room for two packed tiles of kBlockRows
    // rows. `after` is where the caller will go on reading behind the last column, so that the
    // first tiles there are prefetched as well; null: x is in the cache, nothing is prefetched.
    template <class Src, class Elem>
    static void outer(const Coefficients<E>& h, int64_t rows, int64_t rp, const Src* x, int64_t ldx,
                      int64_t cols, const Sums& sums, Elem* packed, const Src* after) {
        Elem* next = packed + kBlockRows * kTile;
        for (int64_t m = 0; m < rows; m += E::kDepth)
            E::pack_outer(x, ldx, rows, m, packed);
        for (int64_t c = 0; c < cols; c += kTile) {
            const int64_t later = c + kTilesAhead * kTile;
            const Src* ahead = after == nullptr ? nullptr
                               : later < cols   ? x + later
                                                : after + (later - cols);
            const Sums tile{sums.data + c / kTile * sums.tile, 0, sums.row};
            if (c + kTile < cols)
                outer_tile<true>(h, rows, rp, packed, tile, x + c + kTile, ldx, next, ahead);
            else
                outer_tile<false>(h, rows, rp, packed, tile, x, ldx, next, ahead);
            Elem* done = packed;
            packed = next;
            next = done;
        }
    }

    // Brings finished sums into the order of the columns.
    static void finish_sums(const Sums&, int64_t, int64_t) {}

  private:
    template <bool kPanel, class Elem>
    static void dot_by_rows(const Elem* x, int64_t ldx, int64_t rows, const Elem* p, int64_t ldp,
                            int64_t rp, int64_t tiles, float* z, int64_t ldz) {
        int64_t m = 0;
        for (; m + kRowGroup <= rows; m += kRowGroup)
            dot_rows<kRowGroup, kPanel>(x + m * ldx, ldx, p, ldp, rp, tiles, z + m * ldz, ldz);
        x += m * ldx;
        z += m * ldz;
        switch (rows - m) {
        case 1:
            return dot_rows<1, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
        case 2:
            return dot_rows<2, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
#if AFA_VECTOR_REGISTERS >= 32
        case 3:
            return dot_rows<3, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
        case 4:
            return dot_rows<4, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
        case 5:
            return dot_rows<5, kPanel>(x, ldx, p, ldp, rp, tiles, z, ldz);
#endif
        }
    }
    template <int kRows, bool kPanel, class Elem>
    static void dot_rows(const Elem* x, int64_t ldx, const Elem* p, int64_t ldp, int64_t rp,
                         int64_t tiles, float* z, int64_t ldz) {
        constexpr int kStep = E::kDepth * kLanes;
        const int64_t row = kPanel ? kTile : ldp, step = kPanel ? rp * kTile : kTile;
        for (int64_t j = 0; j < rp; j += kGroup, p += kGroup * row) {
            Vec acc[kRows][kGroup];
            for (int m = 0; m < kRows; ++m)
                for (int g = 0; g < kGroup; ++g)
                    acc[m][g] = zero();
            for (int64_t t = 0; t < tiles; ++t) {
                const Elem* tile = p + t * step;
                if (j == 0)
                    prefetch_tile(x + kRows * ldx + t * kTile, ldx, kRows);
#pragma GCC unroll 4
                for (int v = 0; v < kTile; v += kStep) {
                    typename E::Operand left[kRows];
#pragma GCC unroll 8
                    for (int m = 0; m < kRows; ++m)
                        left[m] = E::load_operand(x + m * ldx + t * kTile + v);
#pragma GCC unroll 4
                    for (int g = 0; g < kGroup; ++g) {
                        const typename E::Operand right = E::load_operand(tile + g * row + v);
#pragma GCC unroll 8
                        for (int m = 0; m < kRows; ++m)
                            acc[m][g] = E::multiply_add(left[m], right, acc[m][g]);
                    }
                }
            }
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m)
                add_sums(z + m * ldz + j, acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
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
#if AFA_VECTOR_REGISTERS >= 32
        case 3:
            return expand_group<3>(h, m, rows, rp, r, panel, target, begin, end);
        case 4:
            return expand_group<4>(h, m, rows, rp, r, panel, target, begin, end);
        case 5:
            return expand_group<5>(h, m, rows, rp, r, panel, target, begin, end);
#endif
        }
    }
    // Columns [begin, end) of kRows rows. While a tile is computed, the one that comes kTilesAhead
    // later is prefetched: it lies in this group of rows, in the next one, or in the next columns.
    template <int kRows, class Elem, class T>
    static void expand_group(const Coefficients<E>& h, int64_t row, int64_t rows, int64_t rp,
                             int64_t r, const Elem* panel, const Target<T>& target, int64_t begin,
                             int64_t end) {
        const int64_t width = round_up(end - begin, kTile), skip = kTilesAhead * kTile;
        int64_t next_row = row + skip / width * kRows, next_col = begin + skip % width;
        for (int64_t c = begin; c < end; c += kTile, next_col += kTile) {
            if (next_col >= begin + width) {
                next_col -= width;
                next_row += kRows;
            }
            if (next_row < rows)
                prefetch_target(target, next_row, next_col, kRows);
            else
                prefetch_target(target, next_row - rows, next_col + width, kRows);
            expand_rows<kRows>(h.rows + row * rp, rp, r, panel + c * rp, target, row, c,
                               static_cast<int>(min_of<int64_t>(kTile, end - c)));
        }
    }
    // One tile of kRows rows.
    template <int kRows, class Elem, class T>
    static void expand_rows(const Elem* h, int64_t ld, int64_t r, const Elem* panel,
                            const Target<T>& target, int64_t row, int64_t col, int cols) {
        Vec acc[kRows][kVectors];
        for (int m = 0; m < kRows; ++m)
            for (int v = 0; v < kVectors; ++v)
                acc[m][v] = zero();
        for (int64_t j = 0; j < r; j += E::kDepth) {
            typename E::Operand right[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                right[v] = E::load_operand(panel + j * kTile + v * E::kDepth * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) {
                const typename E::Operand left = E::broadcast_operand(h + m * ld + j);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    acc[m][v] = E::multiply_add(left, right[v], acc[m][v]);
            }
        }
        write_tile(target, row, col, acc, cols);
    }

    // One tile of outer: x is packed; meanwhile the next tile, whose rows begin at `x`, is packed
    // into `next`, and the one at `ahead` prefetched.
    template <bool kPackNext, class Src, class Elem>
    static void outer_tile(const Coefficients<E>& h, int64_t rows, int64_t ld, const Elem* packed,
                           const Sums& sums, const Src* x, int64_t ldx, Elem* next,
                           const Src* ahead) {
        constexpr int kWidth = AFA_VECTOR_REGISTERS >= 32 ? 4 : 2;
        const Src* none = nullptr;
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
    template <bool kPackNext, int kWidth, class Src, class Elem>
    static inline __attribute__((always_inline)) void
    outer_group(const Coefficients<E>& h, int64_t rows, int64_t ld, int64_t j, const Elem* packed,
                float* sums, int64_t ld_sums, const Src* x, int64_t ldx, Elem* next,
                const Src* ahead) {
        constexpr int kRows = E::kDepth;
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
                right[v] = E::load_operand(packed + m * kTile + v * kRows * kLanes);
#pragma GCC unroll 4
            for (int g = 0; g < kGroup; ++g) {
                const typename E::Operand left =
                    E::broadcast_operand(h.columns + m * ld + kRows * (j + g));
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
};

}  // namespace afa::cpu::AFA_ISA
